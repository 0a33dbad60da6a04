"""`reward_model_type: api`: a server scores answers."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core.addresses import api_key
from luthier.core.errors import RunFailed
from luthier.core.log import warn
from luthier.core.refusals import NoRedirect, body_of, json_of
from luthier.training.rewards import Answered, checked

API_KEY_VARIABLE = "REWARD_API_KEY"
TIMEOUT_SECONDS, NUM_ATTEMPTS, PAUSE_SECONDS = 600.0, 3, 1.0
"""One request has all answers of a rollout, which a large reward model scores for minutes."""
RETRIED = (408, 425, 429)
"""Statuses below 500 that may pass, such as that of a busy server."""


@dataclass(frozen=True, slots=True)
class RewardServer:
    """POST {"model": "model", "messages": [text, ...]} -> {"scores": [number, ...]}. `REWARD_API_KEY` holds its key."""

    name: str
    timeout_seconds: float = TIMEOUT_SECONDS
    pause_seconds: float = PAUSE_SECONDS

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        who = f"reward_model: {self.name}"
        body = json.dumps({"model": "model", "messages": [answered.text for answered in answers]}).encode()
        content = self._ask(who, body)
        if not isinstance(content, Mapping) or "scores" not in content:
            raise RunFailed(f'{who}: the response has no "scores": {str(content)[:200]} -> check the address')
        return checked(who, content["scores"], answers)

    def _ask(self, who: str, body: bytes) -> Any:
        from http.client import HTTPException
        from urllib.error import HTTPError
        from urllib.request import Request, build_opener

        opener = build_opener(NoRedirect)
        headers = {"Content-Type": "application/json"}
        if key := api_key(API_KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(self.name, data=body, headers=headers)
        reason, remedy = "", "check the server"
        for attempt in range(1, NUM_ATTEMPTS + 1):
            try:
                with opener.open(request, timeout=self.timeout_seconds) as response:
                    return json_of(response.read())
            except HTTPError as fault:
                reason = f"status {fault.code}: {body_of(fault, 200).decode(errors='replace')}"
                if fault.code in (401, 403):
                    remedy = f"put the key of the server into the environment variable {API_KEY_VARIABLE}"
                if 300 <= fault.code < 400:
                    reason = f"it redirects to {fault.headers.get('Location', '')}, which is the address to name"
                if fault.code < 500 and fault.code not in RETRIED:
                    break
            # no connection, too slow, cut off, no JSON, or lists without end
            except (OSError, HTTPException, ValueError, RecursionError) as fault:
                reason = str(fault) or type(fault).__name__
            if attempt < NUM_ATTEMPTS:
                warn(f"{who}: attempt {attempt} of {NUM_ATTEMPTS} failed ({reason})")
                time.sleep(self.pause_seconds * attempt)
        raise RunFailed(f"{who}: no scores ({reason}); earlier checkpoints are kept -> {remedy}")
