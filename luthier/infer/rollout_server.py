"""A vLLM server that samples the answers of a training run, and is given the weights of the policy.

The weights go through a folder that trainer and server both see. Written for vLLM 0.33:

    POST /v1/load_lora_adapter    {"lora_name", "lora_path"}
    POST /v1/unload_lora_adapter  {"lora_name"}; both need VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
    POST /collective_rpc          {"method": "reload_weights", "kwargs": {"weights_path"}}
    POST /reset_prefix_cache      both need VLLM_SERVER_DEV_MODE=1

Each adapter has a name of its own, so the server never answers from a cache of the adapter before it.
"""

import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from luthier.core.errors import RunFailed
from luthier.core.threads import all_in_threads
from luthier.infer.engines.vllm import VllmDialect
from luthier.infer.servers.calls import Call, Refused, get_json, message_of
from luthier.infer.servers.child import ChildServer
from luthier.infer.servers.model import FORM_FAULTS, Ask

NUM_REQUESTS = 64
"""That wait for an answer at the same time; the server makes batches of them."""
UPDATE_SECONDS = 1800.0
"""How long the server may take to read new weights."""
_NO_ROUTE = "Not Found"
"""What vLLM says of an address that it does not have. Of a folder that it does not see it says more, with 404 too."""
DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
"""Environment in which a server takes weights."""


@dataclass(slots=True)
class RolloutServer:
    """`host` and `port` as in the address; `key` of its API."""

    host: str
    port: int
    key: str
    child: ChildServer | None = None
    """If this process has started the server."""
    model: str = ""
    """As the server calls what answers: its model, or the adapter that it was given last."""
    label: str = "luthier"
    """What the names of the adapters begin with; one for each run."""
    num_adapters: int = 0

    @classmethod
    def at(cls, address: str, key: str) -> "RolloutServer":
        """`http://host:port`. Raises `RunFailed` if nothing answers there."""
        parts = urlsplit(address)
        server = cls(parts.hostname or "", parts.port or 80, key)
        server.open()
        return server

    def __str__(self) -> str:
        return f"http://{self.host}:{self.port}"

    def open(self) -> None:
        """Ask the server for its model."""
        try:
            self.model = str(get_json(self.host, self.port, "/v1/models", self.key)["data"][0]["id"])
        except (OSError, http.client.HTTPException) as error:
            raise RunFailed(
                f"rollout_server: {self}: nothing answers there ({error or type(error).__name__})"
                " -> start it with `VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL`"
            ) from error
        except (LookupError, TypeError, ValueError) as error:
            raise RunFailed(
                f"rollout_server: {self}: this is not a vLLM server, or it wants another key ({error!r})"
                " -> check the address, and set VLLM_API_KEY to its key"
            ) from error

    def load_adapter(self, folder: Path) -> None:
        """Answer with the adapter in `folder` from now on. Raises `RunFailed`."""
        if self.num_adapters:
            # First, since a server has room for one adapter unless it is told otherwise. It refuses to remove one that
            # has made room for the adapter of another run, and nobody asks for that one any more.
            self._post("/v1/unload_lora_adapter", {"lora_name": self.model}, may_be_refused=True)
        self.follow_adapter()
        self._post("/v1/load_lora_adapter", {"lora_name": self.model, "lora_path": str(folder)})

    def follow_adapter(self) -> None:
        """Ask for the next adapter, which another process gives to the same server."""
        self.num_adapters += 1
        self.model = f"{self.label}-{self.num_adapters}"

    def reload(self, folder: Path) -> None:
        """Answer with the weights in `folder` from now on. Raises `RunFailed`."""
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        self._post("/reset_prefix_cache", {})

    def answers(self, asks: Sequence[Ask]) -> list[list[int]]:
        """The token ids of each answer, the one that ends it included. Raises `RunFailed`."""
        dialect = VllmDialect(self.model)
        calls = [Call(self.host, self.port, dialect.path, _body(dialect, ask), self.key) for ask in asks]
        works = [partial(self._answer, dialect, ask, call) for ask, call in zip(asks, calls, strict=True)]
        try:
            return all_in_threads(works, NUM_REQUESTS)
        finally:  # the server need not finish answers that a signal or a fault has ended
            for call in calls:
                call.hang_up()

    def _answer(self, dialect: VllmDialect, ask: Ask, call: Call) -> list[int]:
        if ask.num_new_tokens <= 0:
            return []
        ids, is_ended = list[int](), False
        try:
            for content in call.events():
                event = dialect.read(content, ask)
                if event.fault:
                    raise Refused(event.fault, is_input=False)
                ids += [token.id for token in event.tokens]
                is_ended = is_ended or event.finish_reason is not None
        except Refused as refusal:
            raise RunFailed(f"vLLM at {self} refuses a prompt: {refusal}") from refusal
        except FORM_FAULTS as error:
            raise RunFailed(
                f"vLLM at {self} answers in another form ({error!r}) -> install vLLM from 0.33 on"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        if not is_ended:
            raise RunFailed(f"vLLM at {self} broke off an answer; earlier checkpoints are kept -> see its log")
        return ids

    def _post(self, path: str, body: Mapping[str, Any], *, may_be_refused: bool = False) -> None:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=UPDATE_SECONDS)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        try:
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        finally:
            connection.close()
        reason = message_of(content)
        if response.status == 404 and reason == _NO_ROUTE:
            names = " ".join(f"{name}={value}" for name, value in DEVELOPMENT.items())
            raise RunFailed(f"vLLM at {self} has no {path} -> start it with {names} in its environment")
        if response.status != 200 and not may_be_refused:
            remedy = " -> it must see the folder too: set rollout_folder" if response.status == 404 else ""
            raise RunFailed(f"vLLM at {self} does not take the weights of {path}: {reason}{remedy}")

    def _broken(self, error: Exception) -> RunFailed:
        if self.child is not None and self.child.ends_within(3.0):
            return self.child.failure()
        return RunFailed(
            f"the connection to vLLM at {self} broke ({error or type(error).__name__}); earlier checkpoints are kept"
            " -> start the server again, and resume"
        )


def _body(dialect: VllmDialect, ask: Ask) -> dict[str, Any]:
    """The request, with the stop strings: here nobody reads the text of an answer while it is sampled."""
    settings = ask.settings
    stops = {"stop": list(settings.stop), "skip_special_tokens": settings.skip_special_tokens} if settings.stop else {}
    return dialect.body(ask) | stops
