"""Find the address of a web server, and refuse addresses that are not public."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_OF_CLOUDS = tuple(map(ipaddress.ip_network, ("168.63.129.16/32", "192.0.0.0/24", "fec0::/10")))
"""Networks of cloud providers' internal services, such as metadata servers. Python may treat them as global."""


class NotPublicError(ValueError):
    """The host has no public address. The message is one line."""


def allowed_address(host: str, port: int, is_allowed: Callable[[str], bool]) -> str:
    """Return the first IP address of `host` that is allowed.

    The connection must go to the returned address, because a second look-up could give another one.

    Raises:
        NotPublicError: the host has no allowed address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise NotPublicError(f"the host {host:.80} does not exist") from None
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if is_allowed(address):
            return address
    raise NotPublicError(f"the host {host:.80} is not on the public internet")


def is_public(address: str) -> bool:
    """Return whether an IP address, and any IPv4 address inside it, can be reached on the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(address is not None and not _is_global(address) for address in inner):
            return False
        if ip.ipv4_mapped is not None:
            return True
    return _is_global(ip)


def _is_global(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    is_inside = any(ip in network for network in _OF_CLOUDS)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not is_inside
