"""Addresses of servers, as a run file names them, and their keys, which no run file holds: it is saved with the
results.
"""

import os
from urllib.parse import urlsplit

from luthier.core.errors import InvalidInput


def is_address(text: str) -> bool:
    """Whether a request can be sent there: http or https, a host, and no port or character that no address has."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    is_plain = text.isprintable() and " " not in text and f"{parts.path}{parts.query}".isascii()
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and is_plain


def api_key(variable: str) -> str:
    """The key in an environment variable; empty if there is none.

    Raises `InvalidInput` for one that no header can hold: http.client would quote it.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InvalidInput(f"{variable}: it has a character that no key has, e.g. a line break -> correct it")
    return key
