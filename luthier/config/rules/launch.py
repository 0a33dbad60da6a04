"""Rules about how a training run is started: by torchrun or Ray, or in ways that this version does not have."""

import os
from typing import Any

from luthier.config.rules.engine import Rule, Rules, all_of, is_set, not_, warning
from luthier.config.sections import is_on


def _under_launcher(run: Any) -> bool:
    return "LOCAL_RANK" in os.environ or any(is_on(os.environ, name) for name in ("FORCE_TORCHRUN", "USE_RAY"))


def _needs_torchrun(key: str) -> Rule:
    return warning(
        (key,),
        "needs a run that torchrun has started",
        "set the environment variable FORCE_TORCHRUN=1",
        all_of(is_set("training", key), not_(_under_launcher)),
    )


def _unavailable(variable: str, reason: str) -> Rule:
    """A launcher of the reference that an environment variable asks for."""
    remedy = f"unset {variable}; several devices are used through torchrun"
    return Rule((variable,), reason, remedy, lambda run: is_on(os.environ, variable), file="environment")


LAUNCH_RULES = Rules(
    (
        _needs_torchrun("deepspeed"),
        _needs_torchrun("fsdp"),
        _unavailable("USE_V1", "there is one engine only"),
        _unavailable("USE_MCA", "Megatron-core is not part of this version"),
        _unavailable("USE_MEGATRON_BRIDGE", "Megatron-Bridge is not part of this version"),
    )
)
