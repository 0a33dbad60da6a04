"""The models below a folder that can be talked to, and one of them as a process of its own.

Each model is a `luthier api` on a port of this machine with a random key. Ending the process frees its memory.
"""

import json
import os
import secrets
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from luthier.config.key_table import catalog, keys_of, sections
from luthier.core.errors import LuthierError, ModelError, RunFailed
from luthier.core.manifest import MANIFEST_NAME
from luthier.core.ports import HOST, free_port
from luthier.infer.servers.child import ChildServer
from luthier.model.adapters._series import MERGED, read_series
from luthier.webui.document import as_yaml, values_of
from luthier.webui.form import field_of
from luthier.webui.runs import find_runs, read_object

TOPICS = ("model", "quantization", "rope_scaling", "generating")
OTHERS = ("finetuning_type", "template", "tool_format", "default_system", "enable_thinking")
STARTS = ("adapter_name_or_path", "train_from_scratch")
"""What training started from: the result has it in it."""
ADAPTER, WHOLE = "adapter_config.json", "config.json"
_ANSWER_SECONDS = 600.0


@cache
def kept_keys() -> frozenset[str]:
    """The keys of a training run that its model needs when it answers: how it is loaded, asked and decoded."""
    found = (key for section in sections() if section.name in TOPICS for key in keys_of(section))
    return frozenset({key.name for key in found if key.status == "supported"} - {*STARTS} | {*OTHERS})


@dataclass(frozen=True, slots=True)
class ChatModel:
    name: str
    about: str
    """Model and adapter."""
    words: tuple[str, ...]
    """What follows `luthier api`."""
    run_file: str = ""
    """The same as the text of a run file."""


def model_of(name: str, values: Mapping[str, str]) -> ChatModel:
    """The model that these keys describe."""
    adapter = values.get("adapter_name_or_path")
    about = values.get("model_name_or_path", "") + (f" + {adapter}" if adapter else "")
    fields = {key: field_of(catalog()[key][0]) for key in values}
    text = "".join(f"{key}: {as_yaml(value, is_text=fields[key].is_text)}\n" for key, value in values.items())
    return ChatModel(name, about, tuple(f"--{key}={value}" for key, value in values.items()), text)


def chat_models(root: Path) -> dict[str, ChatModel]:
    """Name -> model: the results and checkpoints of the runs below `root`, and the models that they began with."""
    tuned: dict[str, ChatModel] = {}
    bases: dict[str, ChatModel] = {}
    for run in find_runs(root):
        given = values_of(run.text)
        kept = {key: value for key, value in given.items() if value and key in kept_keys()}
        if "model_name_or_path" not in kept:
            continue
        base = f"{kept['model_name_or_path']} (base)"
        bases.setdefault(base, model_of(base, {key: kept[key] for key in kept if key != "finetuning_type"}))
        for folder in (run.folder, *sorted(run.folder.glob("checkpoint-*"), key=_step, reverse=True)):
            name = folder.relative_to(root).as_posix()
            if os.path.isfile(folder / ADAPTER):
                adapters = ",".join([*_beneath(folder, Path(kept["model_name_or_path"])), name])
                tuned[name] = model_of(name, kept | {"adapter_name_or_path": adapters})
            elif os.path.isfile(folder / WHOLE):
                tuned[name] = model_of(name, kept | {"model_name_or_path": name})
    return tuned | bases


def _beneath(adapter: Path, model: Path) -> list[str]:
    """The adapters that this one was trained on top of, in order, without those that an export merged into `model`."""
    try:
        found = read_series(adapter)
    except ModelError:  # the process of the model says what is wrong
        return []
    merged = read_object(model / MANIFEST_NAME).get(MERGED)
    merged = [one.get("sha256") for one in merged if isinstance(one, dict)] if isinstance(merged, list) else []
    is_inside = merged == [one.sha256 for one in found[: len(merged)]]
    return [one.path for one in (found[len(merged) :] if is_inside else found)]


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


class LoadedModel:
    """A model in a process. It ends with `close`, and with the board, however that ends."""

    def __init__(self, model: ChatModel) -> None:
        """Wait until it answers. Raises `RunFailed` with the end of its log if it does not."""
        self.model = model
        self._key = secrets.token_urlsafe(24)
        port = free_port()
        environ = {"API_HOST": HOST, "API_PORT": str(port), "API_KEY": self._key, "API_VERBOSE": "0"}
        command = [sys.executable, "-m", "luthier", "api", *model.words]
        self._server = ChildServer("model", command, port, environ)
        self._address = f"http://{HOST}:{port}/v1/chat/completions"
        self._server.wait_until_healthy()

    @property
    def is_alive(self) -> bool:
        return self._server.is_alive

    def close(self) -> None:
        self._server.close()

    async def answer(self, request: Mapping[str, Any]) -> AsyncIterator[tuple[str, str]]:
        """(kind, text) as they come; kind is `thought`, `answer` or `calls`. Raises `RunFailed` if it fails."""
        body = {**request, "model": "any", "stream": True}
        headers = {"authorization": f"Bearer {self._key}"}
        timeout = httpx.Timeout(_ANSWER_SECONDS)
        try:
            async with (
                httpx.AsyncClient(timeout=timeout, trust_env=False) as client,
                client.stream("POST", self._address, json=body, headers=headers) as response,
            ):
                if response.status_code != 200:
                    raise _refused(await response.aread())
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        for part in _parts(json.loads(line.removeprefix("data: "))):
                            yield part
        except httpx.HTTPError as fault:
            raise RunFailed(f"{self.model.name}: the model does not answer any more ({fault})") from fault


def _refused(body: bytes) -> LuthierError:
    try:
        return RunFailed(str(json.loads(body)["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return RunFailed(body.decode("utf-8", "replace"))


def _parts(event: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "error" in event:
        raise RunFailed(str(event["error"].get("message")))
    found = []
    for choice in event.get("choices", ()):
        delta = choice.get("delta", {})
        found += [("thought", delta.get("reasoning_content")), ("answer", delta.get("content"))]
        for call in delta.get("tool_calls") or ():
            function = call.get("function", {})
            found.append(("calls", (function.get("name") or "") + (function.get("arguments") or "")))
    return [(kind, text) for kind, text in found if text]
