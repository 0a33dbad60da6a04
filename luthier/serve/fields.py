"""Fields without effect: most are harmless and named in the answer; a few would change its meaning and are refused."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from luthier.core.log import info
from luthier.serve.errors import ApiError
from luthier.serve.protocol import Body, extras

HEADER = "x-luthier-ignored"
_NEUTRAL: tuple[Any, ...] = (None, "", [], {}, False)
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "this server answers with text"),
    "modalities": ((["text"],), "this server answers with text"),
    "prediction": ((), "this server does not take the text of an answer in advance"),
    "web_search_options": ((), "this server does not search the web"),
    "functions": ((), "this field of an older API is not supported -> send `tools`"),
    "function_call": (("none", "auto"), "this field of an older API is not supported -> send `tool_choice`"),
}
"""Name -> the values that ask for nothing, and why any other is refused."""
_MAX_NAMES, _MAX_LENGTH = 20, 60
_MAX_LOGGED = 200


class IgnoredFields:
    """Names them in the log, each once."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def headers(self, request: Body) -> dict[str, str]:
        """The header that names what this request has and the server ignores; empty if there is nothing.

        Raises `ApiError` for a field that cannot be ignored.
        """
        names = sorted(extras(request))
        for name in names:
            if name in _REFUSED:
                _refuse(name, (request.model_extra or {})[name])
        shown = [quote(name[:_MAX_LENGTH], safe="._-") for name in names if name not in _REFUSED][:_MAX_NAMES]
        fresh = [name for name in shown if name not in self._logged]
        if fresh and len(self._logged) < _MAX_LOGGED:
            self._logged.update(fresh)
            info(f"a request has fields without effect: {', '.join(fresh)} (each is logged once)")
        return {HEADER: ",".join(shown)} if shown else {}


def _refuse(name: str, value: Any) -> None:
    neutral, reason = _REFUSED[name]
    if value not in (*_NEUTRAL, *neutral):
        raise ApiError(f"{name}: {reason}", param=name, code="unsupported_parameter")
