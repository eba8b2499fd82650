"""What a request's head says before its body is read: refusals need nothing else, and cost nothing else.

A web page that somebody visits can send requests to this machine too: under a name of its own that it lets
point here (DNS rebinding), or straight, as long as it is no JSON. Names that are not this service's, pages of
any origin and bodies that are not declared as JSON are refused; no CORS header is ever sent.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from edge_reasoner.errors import InputError
from edge_reasoner.server.limits import HttpLimits
from edge_reasoner.server.protocol import RequestError

_HOST = re.compile(
    r"(?:\[(?P<six>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[A-Za-z0-9._-]{1,253}))(?P<port>:[0-9]{0,5})?"
)
_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n)")
_LENGTH_LINE = re.compile(rb"^content-length[ \t]*:", re.IGNORECASE | re.MULTILINE)
_METHODS_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True)
class Head:
    """A request's head. Names of headers are in lower case; `local`: the address that the client reached."""

    method: str
    target: str
    version: str
    headers: Sequence[tuple[bytes, bytes]]
    local: str = ""

    def all(self, name: bytes) -> list[str]:
        """Every value of a header."""
        return [value.decode("latin-1") for key, value in self.headers if key == name]

    def path(self) -> str:
        """The decoded path. Raises RequestError(400) for what no path looks like."""
        path = self.target.partition("?")[0]
        if not path.startswith("/"):
            raise RequestError(400, "the request's target must be a path that begins with /")
        if _BAD_ESCAPE.search(path):
            raise RequestError(400, "the path has a % that no two hexadecimal digits follow")
        try:
            plain = unquote_to_bytes(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(400, "the path is not valid UTF-8") from error
        if any(ord(char) < 32 or 127 <= ord(char) < 160 for char in plain):
            raise RequestError(400, "the path holds control characters")
        return plain


def check_lines(raw: bytes) -> None:
    """Refuses what a lenient parser evens out: line ends other than CRLF, a length that is told twice.

    `raw`: a head as it came, and what follows it. Raises RequestError(400).
    """
    end = _END_OF_HEAD.search(raw)
    head = raw if end is None else raw[: end.end()]
    if _BARE_LINE_END.search(head):
        raise RequestError(400, "lines of a head must end with CRLF")
    if len(_LENGTH_LINE.findall(head)) > 1:
        raise RequestError(400, "the length of the body is told more than once")


class Guard:
    """The rules of one service for heads."""

    def __init__(
        self, limits: HttpLimits, *, names: Iterable[str] = (), auth_token: str | None = None
    ) -> None:
        """`names`: further host names or addresses that clients may call the service by, "*" for any.
        `auth_token`: what /v1 demands as bearer token; None: nothing. Raises InputError."""
        self._limits = limits
        self._auth_token = auth_token
        self._names = frozenset(_checked(name) for name in names)

    def check(self, head: Head) -> None:
        """Raises RequestError for a request that is not served."""
        self._check_framing(head)
        path = head.path()
        self._check_host(head)
        self._check_page(head)
        if self._auth_token is not None and path != "/healthz":
            self._check_token(head.all(b"authorization"), self._auth_token)
        if head.method == "POST":
            self._check_json(head)

    def _check_framing(self, head: Head) -> None:
        """One length, told once: what two readers could understand differently is not read at all."""
        if head.version not in ("1.0", "1.1"):
            raise RequestError(505, "the version of HTTP must be 1.0 or 1.1")
        size = sum(len(name) + len(value) + 4 for name, value in head.headers) + len(head.target)
        if size > self._limits.head_bytes or len(head.headers) > self._limits.headers:
            raise RequestError(
                431,
                f"the head exceeds {self._limits.head_bytes} bytes or {self._limits.headers} fields",
            )
        lengths, codings = head.all(b"content-length"), head.all(b"transfer-encoding")
        if lengths and codings:
            raise RequestError(400, "content-length and transfer-encoding exclude each other")
        if len(lengths) > 1 or len(codings) > 1:
            raise RequestError(400, "the length of the body is told more than once")
        if codings and head.version == "1.0":
            raise RequestError(400, "HTTP/1.0 knows no transfer-encoding")
        if lengths and int(lengths[0]) > self._limits.body_bytes:
            raise RequestError(413, f"the request exceeds {self._limits.body_bytes} bytes")
        if (codings or (lengths and int(lengths[0]))) and head.method in _METHODS_WITHOUT_BODY:
            raise RequestError(400, f"{head.method} takes no body")

    def _check_host(self, head: Head) -> None:
        hosts = head.all(b"host")
        if len(hosts) > 1:
            raise RequestError(400, "Host is told more than once")
        if not hosts:
            return  # HTTP/1.0, which no browser speaks
        if "*" in self._names or self._is_ours(hosts[0], head.local):
            return
        raise RequestError(
            403,
            f"Host {hosts[0][:100]!r} is no name of this service (--allow-host NAME adds one)",
        )

    def _is_ours(self, host: str, local: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = (found["six"] or found["name"]).lower().rstrip(".")
        if name in self._names or name == "localhost" or name.endswith(".localhost"):
            return True
        address = _address(name)
        return address is not None and (address.is_loopback or address == _address(local))

    def _check_page(self, head: Head) -> None:
        if head.all(b"origin"):
            raise RequestError(403, "requests of web pages (with an Origin) are not served")
        if any(site not in ("none", "same-origin") for site in head.all(b"sec-fetch-site")):
            raise RequestError(403, "requests of other sites' pages are not served")

    def _check_token(self, given: Collection[str], token: str) -> None:
        # header bytes arrive decoded as Latin-1, whatever they are
        wanted = f"Bearer {token}".encode()
        if len(given) != 1 or not hmac.compare_digest(next(iter(given)).encode("latin-1"), wanted):
            raise RequestError(401, "missing or wrong bearer token", "authentication_error")

    def _check_json(self, head: Head) -> None:
        kinds = head.all(b"content-type")
        if len(kinds) != 1 or kinds[0].partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "the body must be declared as content-type application/json")
        if head.all(b"content-encoding") not in ([], ["identity"]):
            raise RequestError(415, "the body must not be compressed")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def _checked(name: str) -> str:
    plain = name.strip().lower().removeprefix("[").removesuffix("]").rstrip(".")
    if plain != "*" and not _NAME.fullmatch(plain):
        raise InputError(f"allow_hosts={name[:100]!r}: a host name or address without port is needed, or *")
    return plain
