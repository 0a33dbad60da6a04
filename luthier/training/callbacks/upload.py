"""Uploads of checkpoints while training goes on: `push_to_hub` with a `hub_strategy` other than `end`.

every_save        the weights of the newest checkpoint, at the top of the repository
checkpoint        the same, and the whole checkpoint as `last-checkpoint`, to resume from
all_checkpoints   the same, and each checkpoint under its name

A thread uploads a copy made of hard links, so `save_total_limit` may remove the checkpoint meanwhile. transformers
uploads the checkpoint itself, which may be gone, and a `training_args.bin` that holds the token.
"""

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from luthier.core.drafts import draft_name, remove
from luthier.core.log import info, warn
from luthier.training.checkpoints.store import CHECKPOINT_PREFIX

if TYPE_CHECKING:
    from transformers import TrainingArguments

STATE_FILES = (
    *(
        "optimizer*",
        "scheduler*",
        "scaler*",
        "rng_state*",
        "experience_*",
        "*_state.json",
        "manifest.json",
        "place.json",
    ),
    *("global_step*", "latest", "zero_to_fp32.py", "pytorch_model_fsdp*"),
)
"""Of a checkpoint: what only a resumed run needs."""
WHOLE = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: None}
"""Strategy that uploads whole checkpoints -> their folder in the repository; None: of the same name."""


class UploadCheckpoints(TrainerCallback):
    def __init__(self, repository: str) -> None:
        self.repository = repository
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._uploads: list[Future[None]] = []

    def on_save(self, args: "TrainingArguments", state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or args.hub_strategy == HubStrategy.END:
            return
        assert args.output_dir is not None, "the rules require output_dir"
        folder = Path(args.output_dir, f"{CHECKPOINT_PREFIX}{state.global_step}")
        if not folder.is_dir():
            return  # the disk was full, which has been told
        if not args.hub_always_push and any(not one.done() for one in self._uploads):
            info(f"push_to_hub: {folder.name} is left out, an earlier upload still runs (hub_always_push uploads each)")
            return
        copy = folder.with_name(draft_name(f"upload-{folder.name}"))
        remove(copy)
        try:
            shutil.copytree(folder, copy, copy_function=_link)
        except OSError as fault:
            remove(copy)
            _tell_failure(folder.name, fault)
            return
        self._uploads.append(self._thread.submit(self._upload, args, copy, folder.name))

    def on_train_end(self, args: "TrainingArguments", state: Any, control: Any, **kwargs: Any) -> None:
        self._thread.shutdown()
        for one in self._uploads:
            one.result()

    def _upload(self, args: "TrainingArguments", copy: Path, name: str) -> None:
        """A failure costs nothing but this upload: the result is uploaded at the end."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError

        api = HfApi(token=args.hub_token)
        words: dict[str, Any] = {"repo_id": self.repository, "revision": args.hub_revision}
        try:
            api.upload_folder(
                **words, folder_path=copy, ignore_patterns=list(STATE_FILES), commit_message=f"Weights of {name}"
            )
            if args.hub_strategy in WHOLE:
                place = WHOLE[HubStrategy(args.hub_strategy)] or name
                api.upload_folder(**words, folder_path=copy, path_in_repo=place, commit_message=f"All of {name}")
        except (OSError, ValueError, HTTPError) as fault:
            _tell_failure(name, fault)
        finally:
            remove(copy)


def _tell_failure(name: str, fault: Exception) -> None:
    reason = (str(fault).splitlines() or [type(fault).__name__])[0]
    warn(f"push_to_hub: {name} could not be uploaded ({reason}); training goes on")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target)
