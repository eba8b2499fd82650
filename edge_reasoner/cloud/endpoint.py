"""Where a cloud is: its URL as it is asked, and as it may be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote_plus

import httpx

from edge_reasoner.cloud.redact import is_telling, shown_url
from edge_reasoner.errors import InputError, one_line

_ENDPOINT_PATHS = ("/chat/completions", "/completions", "/chat", "/models")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_QUERY_CHARS = 4000
#: values that name a version: an endpoint's errors may speak of it
_VERSION = re.compile(r"v?[0-9][0-9.\-]*(?:-?(?:preview|alpha|beta|latest|rc)[0-9]*)?", re.IGNORECASE)
_SECRET_NAME = re.compile(r"key|token|secret|sig|pass|pwd|auth|code|cred", re.IGNORECASE)


@dataclass(frozen=True)
class Endpoint:
    """The URL of an API. `shown` has no query; `query_secrets` are values of the query that may be secret."""

    shown: str
    url: httpx.URL = field(repr=False)
    query_secrets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def scheme(self) -> str:
        """http or https."""
        return self.url.scheme

    @property
    def host(self) -> str:
        """Name or address, without brackets."""
        return self.url.host

    @property
    def port(self) -> int:
        """As given, or as the scheme says."""
        return self.url.port or _DEFAULT_PORTS[self.url.scheme]

    def target(self, path: str) -> httpx.URL:
        """The URL of a path of the API, with the query that the API's URL came with."""
        own, mark, query = self.url.raw_path.partition(b"?")
        return self.url.copy_with(raw_path=own.rstrip(b"/") + path.encode("ascii") + mark + query)


def parse_endpoint(url: str) -> Endpoint:
    """The endpoint of a URL: a full path or a doubled version is trimmed to what the protocol adds to.

    Raises InputError; neither a password nor a query is ever shown.
    """
    shown = shown_url(url) if isinstance(url, str) else repr(url)
    try:
        # what stands around it comes from copying
        parsed = httpx.URL(url.strip())
        host, port = parsed.host, parsed.port
    except (httpx.InvalidURL, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"cloud URL {shown!r}: {_invalid(error)}") from None
    if parsed.scheme not in ("http", "https") or not host:
        raise InputError(f"cloud URL {shown!r}: expected http://HOST[:PORT]/v1 or https://HOST/v1")
    if port is not None and not 0 < port < 65536:
        raise InputError(f"cloud URL {shown!r}: port {port} is not allowed; give 1 to 65535")
    if parsed.userinfo or parsed.fragment:
        raise InputError(
            f"cloud URL {shown!r}: user, password and fragment are not allowed in it; "
            "a key belongs into an environment variable"
        )
    if len(parsed.query) > _MAX_QUERY_CHARS:
        raise InputError(f"cloud URL {shown!r}: its query is longer than {_MAX_QUERY_CHARS} characters")
    path = _trimmed(parsed.raw_path.partition(b"?")[0].decode("ascii")).encode("ascii")
    query = parsed.query
    return Endpoint(
        str(parsed.copy_with(raw_path=path)).rstrip("/"),
        parsed.copy_with(raw_path=path + (b"?" + query if query else b"")),
        _secrets(query.decode("ascii", "replace")),
    )


def _trimmed(path: str) -> str:
    path = path.rstrip("/")
    for end in _ENDPOINT_PATHS:
        path = path.removesuffix(end).rstrip("/")
    while path.endswith("/v1/v1"):
        path = path.removesuffix("/v1")
    return path or "/"


def _secrets(query: str) -> tuple[str, ...]:
    found = list[str]()
    for name, value in parse_qsl(query, keep_blank_values=True):
        # a query without names may be a key as a whole
        for said in (value, name if not value else ""):
            if _SECRET_NAME.search(name) or (is_telling(said) and not _VERSION.fullmatch(said)):
                found.append(said)
    raw = [part.partition("=")[2] for part in query.split("&")]
    return tuple(dict.fromkeys([*found, *(part for part in raw if part and unquote_plus(part) in found)]))


def _invalid(error: Any) -> str:
    # the library's message may quote the URL's parts
    return "not a URL" if not isinstance(error, httpx.InvalidURL) else one_line(str(error).split("'")[0])
