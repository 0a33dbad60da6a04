"""Fetches a file from a public address, for a caller whom nobody knows.

A server can reach more than its callers: services on its own machine, in its network, of its cloud. So each host, that
of a redirect too, must have public addresses only, and the connection goes to the very address that was checked: a
second look at the name might find another one (DNS rebinding).
"""

import ipaddress
import socket
import time
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

import httpx

from luthier.core.errors import LuthierError

MAX_REDIRECTS = 5
TIMEOUT_SECONDS = 10.0
"""For a host to send anything."""
MAX_SECONDS = 60.0
"""For the whole content, with redirects; a host may send a byte now and then."""
_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""Addresses that a network translates to the IPv4 address in their last 32 bits (RFC 6052)."""
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")
"""The same within one network (RFC 8215); not global, which Python knows since 3.12.4."""


class NotFetched(LuthierError):
    """Why an address was not fetched."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet."""
    ip = ipaddress.ip_address(address)
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    if ip in _NAT64:
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
    return ip.is_global and not ip.is_multicast and ip not in _LOCAL_NAT64 and (inner is None or is_public(str(inner)))


def fetched(url: str, max_bytes: int, *, is_allowed: Callable[[str], bool] = is_public) -> bytes:
    """The content behind `url` (http or https). Raises `NotFetched`. `is_allowed`: which IP addresses may be asked."""
    end = time.monotonic() + MAX_SECONDS
    with httpx.Client(trust_env=False, timeout=TIMEOUT_SECONDS) as client:
        for _ in range(MAX_REDIRECTS + 1):
            host = _host_of(url)
            try:
                found = _content(client, url, is_allowed, max_bytes, end)
                if isinstance(found, bytes):
                    return found
                url = urljoin(url, found)
            except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, ValueError) as fault:
                raise NotFetched(f"{host}: {str(fault) or type(fault).__name__}") from fault
    raise NotFetched(f"there are more than {MAX_REDIRECTS} redirects")


def _host_of(url: str) -> str:
    """Raises `NotFetched` for an address of another kind."""
    try:
        parts = urlsplit(url)
    except ValueError as fault:  # such as http://[
        raise NotFetched(f"this is not an address: {fault}") from fault
    if parts.scheme not in _PORTS or not parts.hostname or parts.username is not None:
        raise NotFetched("only plain addresses with http:// and https:// are fetched")
    return parts.hostname


def _content(
    client: httpx.Client, url: str, is_allowed: Callable[[str], bool], max_bytes: int, end: float
) -> bytes | str:
    """The content, or the address that it has moved to. `end`: when it must be there, by the monotonic clock."""
    target = httpx.URL(url)
    address = _address(target.host, target.port or _PORTS[target.scheme], is_allowed)
    headers = {"Host": target.netloc.decode("ascii"), "Accept": "image/*, video/*, audio/*"}
    extensions = {"sni_hostname": target.host}
    with client.stream("GET", target.copy_with(host=address), headers=headers, extensions=extensions) as answer:
        if answer.has_redirect_location:
            return answer.headers["Location"]
        if answer.status_code != httpx.codes.OK:
            raise NotFetched(f"{target.host} answers with status {answer.status_code}")
        content = bytearray()
        for piece in answer.iter_bytes():
            content += piece
            if len(content) > max_bytes:
                raise NotFetched(f"it has more than {max_bytes:,} bytes")
            if time.monotonic() > end:
                raise NotFetched(f"{target.host} takes longer than {MAX_SECONDS:g} s")
        return bytes(content)


def _address(host: str, port: int, is_allowed: Callable[[str], bool]) -> str:
    """An IP address of the host. All of them must be allowed."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as fault:
        raise NotFetched(f"{host}: {fault.strerror}") from fault
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    if not addresses or not all(map(is_allowed, addresses)):
        raise NotFetched(f"{host} is not an internet address")
    return addresses[0]
