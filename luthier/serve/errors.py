"""What a request can be answered with instead of an answer, always in the shape that OpenAI's clients read.

{"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": null}}
"""

from collections.abc import Mapping, Sequence
from typing import Any

INVALID_REQUEST = "invalid_request_error"
_LONGEST_MESSAGE = 2000


class ApiError(Exception):
    """A request that is refused. `param` names the field at fault, e.g. `messages[0].role`."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.param, self.code = status, type, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        message = str(self)
        if len(message) > _LONGEST_MESSAGE:
            message = message[:_LONGEST_MESSAGE] + " ..."
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}


def loading() -> ApiError:
    return ApiError(
        "the model is still loading; try again soon",
        status=503,
        type="unavailable_error",
        code="model_loading",
        headers={"Retry-After": "1"},
    )


def stopping() -> ApiError:
    return ApiError("the server is shutting down", status=503, type="unavailable_error", code="shutting_down")


def engine_ended(fault: str) -> ApiError:
    return ApiError(fault, status=503, type="unavailable_error", code="engine_ended")


def overloaded(num_waiting: int) -> ApiError:
    return ApiError(
        f"the queue is full ({num_waiting} answers are waiting); try again soon",
        status=503,
        type="server_error",
        code="server_overloaded",
        headers={"Retry-After": "1"},
    )


def wrong_key() -> ApiError:
    return ApiError(
        "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
        status=401,
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def too_large(limit_bytes: int) -> ApiError:
    return ApiError(f"the request has more than {limit_bytes:,} bytes", status=413, code="request_too_large")


def too_long(num_prompt_tokens: int, num_positions: int, param: str) -> ApiError:
    return ApiError(
        f"the prompt has {num_prompt_tokens} tokens and the model takes {num_positions},"
        " which leaves no room for an answer -> shorten it",
        param=param,
        code="context_length_exceeded",
    )


def wrong_kind(message: str) -> ApiError:
    return ApiError(message, status=405, code="wrong_kind_of_model")


def failed() -> ApiError:
    """For faults of the server itself. What happened goes to the log and not to the client."""
    return ApiError("the server failed to answer this request; its log says more", status=500, type="server_error")


def of_status(status: int, path: str, method: str) -> ApiError:
    """What the router refuses: an unknown path, a wrong method."""
    if status == 404:
        return ApiError(
            f"there is nothing at {path}; GET /docs lists what this server offers", status=404, code="not_found"
        )
    if status == 405:
        return ApiError(f"{path} does not take {method}; GET /docs says more", status=405, code="method_not_allowed")
    if status == 400:  # of FastAPI, for a body that Python's json refuses with another error than that for its grammar
        return ApiError("the body cannot be read as JSON: it has a number of too many digits, or is nested too deeply")
    return ApiError(f"the request is refused with status {status}", status=status)


def of_fields(faults: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The first of the faults that pydantic found in a request body, with the field that it is about."""
    fault = _clearest(faults, body)
    if fault["type"] == "json_invalid":
        return ApiError(f"the body is not valid JSON: {fault.get('ctx', {}).get('error', fault['msg'])}")
    if not isinstance(body, Mapping):
        return ApiError("the body is not a JSON object; send one with `Content-Type: application/json`")
    param = field_of(fault["loc"], body, is_missing=fault["type"] == "missing")
    if fault["type"] == "missing":
        return ApiError(f"{param or 'the body'}: this field is required", param=param)
    reason = str(fault["msg"]).removeprefix("Value error, ")
    return ApiError(f"{param}: {reason}" if param else reason, param=param or None)


def _clearest(faults: Sequence[Mapping[str, Any]], body: Any) -> Mapping[str, Any]:
    """The first fault, unless it is that a value is not of the first kind that its field may have, and of another kind
    it is, but for this fault: a list of five stop strings is no string, and longer than such a list may be."""
    first = faults[0]
    if not _is_of_kind(first):
        return first
    field = field_of(first["loc"], body)
    own = [one for one in faults if f"{field_of(one['loc'], body)}.".startswith((f"{field}.", f"{field}["))]
    return next((one for one in own if not _is_of_kind(one)), first)


def _is_of_kind(fault: Mapping[str, Any]) -> bool:
    return str(fault["type"]).endswith("_type") or fault["type"] == "literal_error"


def field_of(loc: Sequence[Any], body: Any, *, is_missing: bool = False) -> str:
    """`("body", "messages", 0, "content", "str")` -> `messages[0].content`.

    pydantic puts the names of the types that it tried between the names of fields; only what is in the body counts.
    """
    path, here = "", body
    parts = list(loc[1:] if loc and loc[0] == "body" else loc)
    for number, part in enumerate(parts):
        if isinstance(here, Mapping) and isinstance(part, str) and part in here:
            path, here = f"{path}.{part}" if path else part, here[part]
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            path, here = f"{path}[{part}]", here[part]
        elif is_missing and number == len(parts) - 1:
            path = f"{path}.{part}" if path else str(part)
    return path
