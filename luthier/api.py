"""The four functions of `import luthier`. Each takes the keys of a run file as a dict."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from luthier.infer.session import ChatSession
    from luthier.training.fit import RunResult
    from luthier.workflow.comparison import Evaluation


def train(keys: Mapping[str, Any]) -> "RunResult":
    """Run a training stage, as `luthier train` does. Raises `luthier.core.errors.LuthierError`.

    In a program that torchrun starts, each process calls it. Their process group is left when the program ends.
    """
    import os

    from luthier.config.load import load_train
    from luthier.core.ending import leave_group_at_end
    from luthier.core.log import set_up
    from luthier.training.distributed.peers import watched
    from luthier.workflow import training as command

    set_up()
    run = load_train(keys)
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    makes_group = not is_alone and not _has_process_group()
    with watched():
        result = command.train(run)
    if makes_group:
        leave_group_at_end()
    return result


def _has_process_group() -> bool:
    from torch import distributed

    return distributed.is_initialized()


def export(keys: Mapping[str, Any]) -> "Path":
    """Merge adapters and write a model folder, as `luthier export` does."""
    from luthier.config.load import load_export
    from luthier.core.log import set_up
    from luthier.workflow import export as command
    from luthier.workflow.preflight import tell_warnings

    set_up()
    run = load_export(keys)
    tell_warnings(run)
    return command.export(run)


def evaluate(keys: Mapping[str, Any]) -> "Evaluation":
    """Measure a model, as `luthier eval` does."""
    from luthier.config.load import load_eval
    from luthier.core.log import set_up
    from luthier.workflow import comparison as command
    from luthier.workflow.preflight import tell_warnings

    set_up()
    run = load_eval(keys)
    tell_warnings(run)
    return command.evaluate(run)


def chat(keys: Mapping[str, Any]) -> "ChatSession":
    """A loaded model with an empty conversation, as `luthier chat` uses it."""
    from luthier.config.load import load_infer
    from luthier.core.log import set_up
    from luthier.workflow import chat as command
    from luthier.workflow.preflight import tell_warnings

    set_up()
    run = load_infer(keys)
    tell_warnings(run)
    return command.open_chat(run)
