"""Which proxy a cloud is asked through, as the usual environment variables say."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

_LOCAL_NAMES = ("localhost", "ip6-localhost", "localhost.localdomain")
Address = IPv4Address | IPv6Address


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine: what goes there never leaves it."""
    name = host.strip("[]").rstrip(".").lower()
    if name in _LOCAL_NAMES or name.endswith(".localhost"):
        return True
    address = _address(name)
    return address is not None and (address.is_loopback or address.is_unspecified)


def proxy_for(scheme: str, host: str, port: int, environment: Mapping[str, str]) -> tuple[str, str] | None:
    """(variable, proxy URL) for an endpoint, or None for a direct connection.

    For `https`: `https_proxy`, else `all_proxy`, each in lower or upper case, unless `no_proxy` names the
    host. This machine is never asked through a proxy, whatever the variables say, nor is a plain `http`
    endpoint: its proxy would read the prompts, and the answers, of a cloud that the owner chose without it.
    """
    if scheme != "https" or is_loopback(host):
        return None
    names = [f"{scheme}_proxy", "all_proxy"]
    for name in (name for low in names for name in (low, low.upper())):
        value = environment.get(name, "").strip()
        if value:
            break
    else:
        return None
    excluded = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if any(_excludes(entry, host, port) for entry in excluded.replace(",", " ").split()):
        return None
    return name, value if "://" in value else f"http://{value}"


def _excludes(entry: str, host: str, port: int) -> bool:
    """Whether one entry of `no_proxy` names the host: a name and all below it, an address or a network."""
    if entry == "*":
        return True
    entry = entry.lower()
    name, address = host.strip("[]").rstrip(".").lower(), _address(host.strip("[]"))
    if address is not None and "/" in entry:
        try:
            return address in ip_network(entry.strip("[]"), strict=False)
        except ValueError:
            return False
    entry_address = _address(entry.strip("[]"))
    if entry_address is None and entry.rpartition(":")[2].isdecimal() and ":" in entry:
        entry, _, wanted_port = entry.rpartition(":")
        if int(wanted_port[:6]) != port:
            return False
        entry_address = _address(entry.strip("[]"))
    if entry_address is not None:
        return address == entry_address
    entry = entry.removeprefix("*").strip(".")
    return bool(entry) and (name == entry or name.endswith("." + entry))


def _address(host: str) -> Address | None:
    address: Address
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        try:
            # 127.1 and 0x7f000001 are addresses to every resolver
            if not host[:1].isdigit() or " " in host:
                return None
            address = IPv4Address(socket.inet_aton(host))
        except (OSError, ValueError):
            return None
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address
