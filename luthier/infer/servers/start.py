"""Starts a server program with the model of a run."""

import http.client
import json
import os
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import InvalidInput, ModelError, RunFailed
from luthier.core.log import info, warn
from luthier.core.ports import HOST, free_port
from luthier.infer.concurrency import max_concurrent
from luthier.infer.servers.adapter import Limits, adapter_folder
from luthier.infer.servers.calls import get_json
from luthier.infer.servers.child import ChildServer, find_program
from luthier.infer.servers.model import Dialect, ServedModel

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

    from luthier.config.runs import InferRun
    from luthier.infer.engines import Engine
    from luthier.model.files.sources import ModelSource

_UNSERVED = {
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "min_length": 0,
    "min_new_tokens": None,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
    "encoder_repetition_penalty": 1.0,
    "watermarking_config": None,
}
"""Settings of generation_config.json that transformers follows and a request has no field for -> without effect."""

Command = Callable[[str, int, str], tuple[list[str], Mapping[str, str]]]
"""(program, port, key) -> (the command, variables of its environment)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlan:
    """What a server shall serve."""

    model: str
    """A folder, or a name on the Hugging Face hub."""
    adapter: Path | None
    limit: int | None
    """The longest sequence that the model takes; None without a limit."""
    num_devices: int
    revision: str | None = None
    """On the hub; None for a folder."""
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Where the hub's library keeps files, and its token."""
    tokenizer: "PreTrainedTokenizerBase"
    stop_ids: frozenset[int]
    min_p: float | None = None
    stops: tuple[str, ...] = ()
    """Stop strings of every answer."""
    host: str = HOST

    def num_positions(self, asked: int) -> int:
        """The longest sequence: what the run file asks for, if the model takes it. The servers refuse more."""
        if self.limit is None or asked <= self.limit:
            return asked
        info(f"the model takes {self.limit} tokens, so prompt and answer have {self.limit} and not {asked}")
        return self.limit


def plan_server(
    run: "InferRun",
    source: "ModelSource",
    tokenizer: "PreTrainedTokenizerBase",
    stop_ids: Collection[int],
    limits: Limits,
) -> ServerPlan:
    """Raises `ModelError` for a model or an adapter that a server cannot take."""
    from luthier.core.machine import num_accelerators
    from luthier.infer.decoding import stop_strings_of
    from luthier.model.loading.config import load_config

    files, config = source.files, load_config(source).get_text_config()
    if files.gguf_file:
        raise ModelError(
            f"model_name_or_path: {files}: a GGUF file is read by transformers only -> write the model with"
            " `luthier export`, and give its folder"
        )
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"model_name_or_path: {files}: the tokenizer has {len(tokenizer)} tokens and the model has rows for"
            f" {config.vocab_size} -> write a model with all rows with `luthier export`, and give its folder"
        )
    own = _generation_config(source, config)
    return ServerPlan(
        model=str(Path(files.name).resolve()) if files.is_local else files.name,
        adapter=adapter_folder(run.model, limits),
        limit=getattr(config, "max_position_embeddings", None),
        num_devices=max(num_accelerators(), 1),
        revision=None if files.is_local else source.access.revision,
        environ=hub_variables(source),
        tokenizer=tokenizer,
        stop_ids=frozenset(stop_ids) | _end_ids(own),
        min_p=own.min_p,
        stops=stop_strings_of(own),
    )


def start(engine: "Engine", command: Command, dialect: Dialect, plan: ServerPlan) -> ServedModel:
    """Start the program and wait until it answers. Raises `InvalidInput` without it, `RunFailed` if it ends."""
    program = find_program(engine.program)
    if program is None:
        raise InvalidInput(not_installed(engine))
    max_rows = max_concurrent(os.environ)
    port, key = free_port(), secrets.token_urlsafe(24)
    words, environ = command(program, port, key)
    server = ChildServer(engine.name, words, port, {**plan.environ, **environ})
    server.wait_until_healthy()
    try:
        num_positions = int(get_json(HOST, port, "/v1/models", key)["data"][0]["max_model_len"])
    except (OSError, http.client.HTTPException, LookupError, TypeError, ValueError) as error:
        server.close()
        raise RunFailed(
            f"{engine.name} does not say how many tokens it takes ({error!r}) -> {dialect.install_hint}"
        ) from error
    return ServedModel(
        server,
        key,
        dialect,
        plan.tokenizer,
        plan.stop_ids,
        num_positions=num_positions,
        max_rows=max_rows,
        min_p=plan.min_p,
        stops=plan.stops,
    )


def not_installed(engine: "Engine") -> str:
    return f"infer_backend: {engine.name}: there is no program {engine.program} here -> {engine.install}"


def options(words: Mapping[str, Any]) -> list[str]:
    """`{"max_len": 8, "eager": True, "swap": False, "config": {"a": 1}}` ->
    `--max-len 8 --eager --no-swap --config {"a": 1}`. Null leaves an option out."""
    found: list[str] = []
    for name, value in words.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
            continue
        values = value if isinstance(value, list | tuple) else [value]
        found += [f"--{flag}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in values)]
    return found


def _generation_config(source: "ModelSource", config: "PreTrainedConfig") -> "GenerationConfig":
    """generation_config.json of the model, else what its config says. What a server does not get is a warning.

    Raises `ModelError` for one that cannot be used.
    """
    from transformers import GenerationConfig

    from luthier.model.loading.loaded import check_generation_config

    check_generation_config(source)
    try:
        own = GenerationConfig.from_pretrained(source.files.name, **source.access.options)
    except OSError:  # there is none
        return GenerationConfig.from_model_config(config)
    warn_of_unserved(own, "infer_backend")
    return own


def warn_of_unserved(own: "GenerationConfig", key: str) -> None:
    """Says which settings of a generation_config.json a server does not get. `key`: that chooses the server."""
    unserved = [name for name, neutral in _UNSERVED.items() if getattr(own, name, None) not in (None, neutral)]
    if unserved:
        warn(f"generation_config.json sets {', '.join(unserved)}, which only {key}: huggingface follows")


def _end_ids(own: "GenerationConfig") -> frozenset[int]:
    ends = own.eos_token_id
    return frozenset() if ends is None else frozenset((ends,) if isinstance(ends, int) else ends)


def hub_variables(source: "ModelSource") -> dict[str, str]:
    """What a server must be told to find the files of a model on the hub; nothing for a folder."""
    access = source.access
    found = {"HF_HUB_CACHE": access.cache_dir, "HF_TOKEN": access.token}
    return {name: value for name, value in found.items() if value is not None and not source.files.is_local}
