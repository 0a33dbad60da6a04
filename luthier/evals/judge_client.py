"""A model behind an OpenAI-style API that judges: POST {judge_url}/chat/completions.

The key of the API is read from the variable JUDGE_API_KEY, never from the run file, which is saved with the results.
Redirects are not followed: they could carry the key to another host.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message as Headers
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import OpenerDirector, Request, build_opener

from luthier.core.addresses import api_key, is_address
from luthier.core.errors import InvalidInput, RunFailed
from luthier.core.log import warn
from luthier.core.refusals import NoRedirect, body_of, json_of

API_KEY_VARIABLE = "JUDGE_API_KEY"
NUM_ATTEMPTS, PAUSE_SECONDS, MAX_PAUSE_SECONDS, TIMEOUT_SECONDS = 5, 1.0, 60.0, 300.0
RETRIED = (408, 409, 429)
"""Statuses below 500 that may pass."""
MAX_BODY_BYTES = 4000
"""Of a refusal."""
_PATH = "/chat/completions"


@dataclass(slots=True)
class JudgeClient:
    url: str
    """With or without /chat/completions at its end."""
    model: str
    pause_seconds: float = PAUSE_SECONDS
    """Before the second attempt; it doubles with each further one. A Retry-After header takes precedence."""
    timeout_seconds: float = TIMEOUT_SECONDS
    _takes_temperature: bool = True
    """False once the server has refused it, as it does for reasoning models of OpenAI."""
    _opener: OpenerDirector = field(default_factory=lambda: build_opener(NoRedirect))

    def __post_init__(self) -> None:
        if not is_address(self.url):
            raise InvalidInput(f"judge_url: {self.url}: not an address of a server -> e.g. https://HOST/v1")
        parts = urlsplit(self.url)
        if parts.username or parts.password:
            raise InvalidInput(f"judge_url: it holds a password -> put the key into the variable {API_KEY_VARIABLE}")

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of the answer; empty if it was refused or cut off.

        Raises `InvalidInput` for a wrong key, model or address, else `RunFailed`.
        """
        reason, key = "", api_key(API_KEY_VARIABLE)
        for attempt in range(1, NUM_ATTEMPTS + 1):
            pause = min(self.pause_seconds * 2 ** (attempt - 1), MAX_PAUSE_SECONDS)
            with_temperature = self._takes_temperature  # another thread may learn meanwhile that it is refused
            try:
                return self._text(self._post(messages, key, with_temperature))
            except HTTPError as fault:
                body = body_of(fault, MAX_BODY_BYTES)
                if with_temperature and fault.code == 400 and _error(body).get("param") == "temperature":
                    self._takes_temperature = False
                    continue
                reason = f"status {fault.code}: {_message(body)}"
                if fault.code < 500 and fault.code not in RETRIED:
                    raise self._refusal(fault, reason) from fault
                pause = _retry_after(fault.headers, pause)
            # no connection, too slow, cut off, no JSON, or lists without end
            except (OSError, HTTPException, ValueError, RecursionError) as fault:
                reason = str(fault) or type(fault).__name__
            if attempt < NUM_ATTEMPTS:
                warn(f"judge_url: {self.url}: attempt {attempt} of {NUM_ATTEMPTS} failed ({reason})")
                time.sleep(pause)
        raise RunFailed(
            f"judge_url: {self.url}: no answer after {NUM_ATTEMPTS} attempts ({reason}); what was judged is kept"
            " -> check the server, then run the same command again"
        )

    def _post(self, messages: Sequence[Mapping[str, str]], key: str, with_temperature: bool) -> Any:
        body: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        if with_temperature:
            body["temperature"] = 0
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = Request(self._endpoint, data=json.dumps(body).encode(), headers=headers)
        with self._opener.open(request, timeout=self.timeout_seconds) as response:
            return json_of(response.read())

    @property
    def _endpoint(self) -> str:
        """The address without its fragment. It may have a query, such as ?api-version=..."""
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/").removesuffix(_PATH)
        return urlunsplit((parts.scheme, parts.netloc, path + _PATH, parts.query, ""))

    def _text(self, content: Any) -> str:
        match content:
            case {"choices": [{"message": {"content": str()}, "finish_reason": "length"}, *_]}:
                return ""  # its reasons were cut off, and may name either answer before the verdict
            case {"choices": [{"message": {"content": str(text)}}, *_]}:
                return text
            case {"choices": [{"message": {"content": None}}, *_]}:  # it refused to answer
                return ""
        raise RunFailed(
            f"judge_url: {self.url}: the response is not a chat completion: {json.dumps(content)[:200]}"
            " -> check the address"
        )

    def _refusal(self, fault: HTTPError, reason: str) -> InvalidInput:
        remedy = f"check judge_url and judge_model ({self.model})"
        if fault.code in (401, 403):
            remedy = f"put the key of this API into the environment variable {API_KEY_VARIABLE}"
        elif 300 <= fault.code < 400:
            remedy = f"name the address that it redirects to: {fault.headers.get('Location', '')}"
        return InvalidInput(f"judge_url: {self.url}: {reason} -> {remedy}")


def _error(body: bytes) -> Mapping[str, Any]:
    """The `error` object of an OpenAI-style response."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    error = content.get("error") if isinstance(content, Mapping) else None
    return error if isinstance(error, Mapping) else {}


def _message(body: bytes) -> str:
    return str(_error(body).get("message") or body.decode(errors="replace"))[:200].strip()


def _retry_after(headers: Headers, pause: float) -> float:
    """Seconds of a Retry-After header; dates in it are not read."""
    try:
        return min(max(0.0, float(headers.get("Retry-After", pause))), MAX_PAUSE_SECONDS)
    except ValueError:
        return pause
