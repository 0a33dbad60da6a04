"""Addresses of servers, as a run file names them."""

from urllib.parse import urlsplit


def is_address(text: str) -> bool:
    """Whether a request can be sent there: http or https, a host, and no port or character that no address has."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    is_plain = text.isprintable() and " " not in text and f"{parts.path}{parts.query}".isascii()
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and is_plain
