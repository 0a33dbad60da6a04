"""`push_to_hub`: the result of a run in a repository of the Hugging Face hub. A failed upload costs no weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import RunFailed
from luthier.core.log import info

if TYPE_CHECKING:
    from luthier.training.trainer import StageTrainer

LEFT_OUT = ("checkpoint-*", "heartbeat*.json", ".*", "_*")
"""hub_strategy decides about checkpoints, a heartbeat is that of a process here, and the rest are drafts."""


@contextmanager
def creating_repository() -> Iterator[None]:
    """Wraps the call that creates the repository. Raises `RunFailed`."""
    from huggingface_hub.errors import HTTPError  # of whichever library the hub's client is built on

    try:
        yield
    except (OSError, ValueError, HTTPError) as fault:
        raise RunFailed(
            f"push_to_hub: the repository cannot be created ({str(fault).splitlines()[0]})"
            " -> check hub_model_id, hub_token and the network, or leave push_to_hub out"
        ) from fault


def upload(trainer: "StageTrainer") -> None:
    """With `push_to_hub`: upload the result, which is complete in the trainer's `output_dir`."""
    args = trainer.args
    if args.push_to_hub and trainer.is_world_process_zero():
        assert trainer.hub_model_id is not None, "init_hf_repo has set it"
        upload_result(Path(trainer.output_dir), trainer.hub_model_id, args.hub_token, args.hub_revision)


def upload_result(output_dir: Path, repository: str, token: str | None, revision: str | None) -> None:
    """Upload what `output_dir` holds besides checkpoints. Raises `RunFailed`; the folder stays as it is."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        HfApi(token=token).upload_folder(
            repo_id=repository,
            folder_path=output_dir,
            commit_message="End of training",
            revision=revision,
            ignore_patterns=list(LEFT_OUT),
        )
    except (OSError, ValueError, HTTPError) as fault:
        raise RunFailed(
            f"push_to_hub: {repository}: the upload failed ({str(fault).splitlines()[0]}); the result is whole, in"
            f" {output_dir} -> run the same command again to upload it"
        ) from fault
    info(f"uploaded to {repository}")
