"""`rollout_backend: vllm`: another program samples the answers, and gets the weights before each rollout.

With an address all processes of the run ask the same server; without one each starts a server of its own, on the device
that it trains on. The first process writes the weights into a folder: an adapter as an adapter, else the whole model.
"""

import os
import secrets
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import InvalidInput, ModelError
from luthier.core.files import require_writable
from luthier.core.kinds import ADAPTERS, ENGINES
from luthier.core.log import info
from luthier.core.ports import HOST, free_port
from luthier.infer.decoding import stop_strings_of
from luthier.infer.rollout_server import DEVELOPMENT, RolloutServer
from luthier.infer.servers.adapter import require_plain_lora
from luthier.infer.servers.child import ChildServer, find_program
from luthier.infer.servers.model import Ask
from luthier.infer.servers.start import hub_variables, options, warn_of_unserved
from luthier.infer.types import Settings
from luthier.model.heads.score_head import VALUE_HEAD
from luthier.model.modules import unwrap
from luthier.model.save import save_weights
from luthier.model.sharded import gathered

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

    from luthier.config.runs import TrainRun
    from luthier.workflow.text import TextSide

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""That vLLM takes as the largest one of an adapter."""


@dataclass(slots=True, weakref_slot=True, kw_only=True)
class ServedRollouts:
    """Samples answers; see `luthier.training.rollouts.Generate`."""

    server: RolloutServer
    args: "TrainingArguments"
    folder: Path
    """Of this run alone; removed at its end."""
    is_adapter: bool
    settings: Settings
    stop_ids: frozenset[int]
    num_positions: int | None
    num_rollouts: int = field(default=0)

    def __call__(self, model: "nn.Module", rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[list[int]]:
        self.push(model)
        return self.server.answers(
            [
                Ask(
                    prompt_ids=row["input_ids"],
                    settings=replace(self.settings, seed=seed),
                    num_new_tokens=self.settings.num_new_tokens(len(row["input_ids"]), self.num_positions),
                    stop_ids=self.stop_ids,
                )
                for row, seed in zip(rows, seeds, strict=True)
            ]
        )

    def push(self, model: "nn.Module") -> None:
        """Give the server the weights of `model`. All processes call it together."""
        from accelerate.utils import wait_for_everyone

        is_first = self.args.process_index == 0
        self.num_rollouts += 1
        # The server may still map the files of the last time.
        target = self.folder / str(self.num_rollouts % 2)
        state = gathered(model, keeps=is_first, only_trained=self.is_adapter)
        if is_first:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            self._write(model, {name: weight for name, weight in state.items() if VALUE_HEAD not in name}, target)
        del state
        wait_for_everyone()
        if is_first or self.server.child is not None:
            if self.is_adapter:
                require_plain_lora(target, "vLLM")
                self.server.load_adapter(target)
            else:
                self.server.reload(target)
        elif self.is_adapter:
            self.server.follow_adapter()
        wait_for_everyone()

    def _write(self, model: Any, state: Mapping[str, Any], target: Path) -> None:
        if self.is_adapter:
            model.save_pretrained(target, state_dict=dict(state))
        else:
            save_weights(unwrap(model), target, dict(state))


def serve_rollouts(
    run: "TrainRun",
    text: "TextSide",
    policy: "nn.Module",
    args: "TrainingArguments",
    settings: Settings,
    stop_ids: frozenset[int],
) -> ServedRollouts:
    """Finds or starts the server. Raises `RunFailed` if it does not answer, `InvalidInput` without vLLM."""
    if text.media is not None:
        raise InvalidInput(
            "rollout_backend: vllm: prompts go to the server as token ids, which images are not"
            " -> leave rollout_backend out"
        )
    from accelerate.utils import broadcast_object_list

    keys, output_dir = run.method, Path(run.training["output_dir"])
    folder = Path(keys.rollout_folder) if keys.rollout_folder else output_dir
    require_writable("rollout_folder", folder)
    is_adapter = ADAPTERS.get(run.finetuning_type).adds_weights
    config = unwrap(policy).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if keys.rollout_server is not None:
        server = RolloutServer.at(keys.rollout_server, os.environ.get("VLLM_API_KEY", ""))
    else:
        server = _started(run, text, policy, args, limit)
    info(f"rollouts: sampled by vLLM at {server}; the weights go through {folder}")
    own = unwrap(policy).generation_config
    warn_of_unserved(own, "rollout_backend")
    (server.label,) = broadcast_object_list([f"rollouts-{secrets.token_hex(4)}"])
    served = ServedRollouts(
        server=server,
        args=args,
        folder=folder.resolve() / server.label,
        is_adapter=is_adapter,
        settings=replace(settings, min_p=own.min_p, stop=stop_strings_of(own)),
        stop_ids=stop_ids,
        num_positions=limit,
    )
    if args.process_index == 0:
        weakref.finalize(served, shutil.rmtree, served.folder, ignore_errors=True)
    return served


def _started(
    run: "TrainRun", text: "TextSide", policy: Any, args: "TrainingArguments", limit: int | None
) -> RolloutServer:
    engine = ENGINES.get("vllm")
    program = find_program(engine.program)
    if program is None:
        raise InvalidInput(
            f"rollout_backend: vllm: there is no program vllm here -> {engine.install}, or give the address of a"
            " server as rollout_server"
        )
    files = text.source.files
    if files.gguf_file:
        raise ModelError(f"model_name_or_path: {files}: a GGUF file is read by transformers only -> export it first")
    port, key = free_port(), secrets.token_urlsafe(24)
    words = [program, "serve", str(Path(files.name).resolve()) if files.is_local else files.name]
    words += options(_server_options(run, policy, port, limit))
    words += options({"revision": None if files.is_local else text.source.access.revision})
    environ = {**DEVELOPMENT, "VLLM_API_KEY": key, **hub_variables(text.source), **_device(args)}
    server = ChildServer(engine.name, words, port, environ)
    server.wait_until_healthy()
    found = RolloutServer(HOST, port, key, server)
    found.open()
    return found


def _server_options(run: "TrainRun", policy: Any, port: int, limit: int | None) -> dict[str, Any]:
    keys = run.generating
    longest = run.data.cutoff_len + max(keys.max_new_tokens, 0) if keys.max_new_tokens > 0 else keys.max_length
    found: dict[str, Any] = {
        "host": HOST,
        "port": port,
        "served_model_name": "base",
        "dtype": str(unwrap(policy).config.dtype or "auto").removeprefix("torch."),
        "max_model_len": longest if limit is None else min(longest, limit),
        "gpu_memory_utilization": run.method.rollout_gpu_util,
        "generation_config": "vllm",
    }
    if ADAPTERS.get(run.finetuning_type).adds_weights:
        rank = next((rank for rank in RANKS if rank >= run.adapter.lora_rank), RANKS[-1])
        found |= {"enable_lora": True, "max_lora_rank": rank}
    return found | ({"trust_remote_code": True} if run.model.trust_remote_code else {})


def _device(args: "TrainingArguments") -> dict[str, str]:
    """The environment in which the server sees the device of this process alone."""
    if args.device.type != "cuda":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    index = args.device.index or 0
    return {"CUDA_VISIBLE_DEVICES": visible[index] if visible != [""] else str(index)}
