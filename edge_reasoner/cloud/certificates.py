"""Which certificates an endpoint may show, as the usual environment variables say."""

from __future__ import annotations

import ssl
import stat
from collections.abc import Mapping
from pathlib import Path

import httpx

from edge_reasoner.errors import CloudUnavailableError, one_line

#: the lists of operating systems have a few hundred kilobytes
_MAX_FILE_BYTES = 16 * 1024 * 1024


def trusting(environment: Mapping[str, str]) -> ssl.SSLContext:
    """Trusts the certificates of `SSL_CERT_FILE` and `SSL_CERT_DIR`, or those that the HTTP library brings
    along. Raises CloudUnavailableError where they cannot be used."""
    file, folder = environment.get("SSL_CERT_FILE") or None, environment.get("SSL_CERT_DIR") or None
    try:
        if file or folder:
            _check(file)
            return ssl.create_default_context(cafile=file, capath=folder)
        return httpx.create_ssl_context(trust_env=False)
    except (OSError, ValueError) as error:
        given = [
            f"{name}={value}" for name, value in (("SSL_CERT_FILE", file), ("SSL_CERT_DIR", folder)) if value
        ]
        text = f"{' '.join(given) or 'the certificates'} cannot be used: {one_line(error)}"
        raise CloudUnavailableError(text) from error


def trusting_nobody() -> ssl.SSLContext:
    """For http://: no certificate will be asked for; this context would refuse each one."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _check(file: str | None) -> None:
    """Raises OSError for what the library would read for ever: a pipe, a device, a huge file."""
    if file is None:
        return
    found = Path(file).stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("not a regular file")
    if found.st_size > _MAX_FILE_BYTES:
        raise OSError(f"larger than {_MAX_FILE_BYTES} bytes")
