"""Imports what a training run imports while it goes on, as the command line does: for the fork server of `killable`."""

from importlib import import_module

from luthier.core.kinds import ADAPTERS, STAGES
from luthier.model.compat import slow_imports

slow_imports.install()
for name in (
    "luthier.config.load",
    "luthier.inspection.terminal",
    "luthier.model.backends",
    "luthier.model.kernels.fuse",
    "luthier.training.fit",
    "luthier.training.report",
    "luthier.training.trainer",
    "luthier.workflow.eval_tasks",
    "luthier.workflow.outcome",
    "luthier.workflow.parts",
    "luthier.workflow.plan.foresight",
    "luthier.workflow.training",
):
    import_module(name)
for kind in (ADAPTERS, STAGES):
    for variant in kind.names:
        kind.get(variant)
