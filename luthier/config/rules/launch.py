"""Rules about how a training run is started: by torchrun or Ray, or in ways that this version does not have."""

import os
from typing import Any

from luthier.config.keys.sharding import GATHERS, deepspeed_settings, zero_settings, zero_stage
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


def _restarts(run: Any) -> bool:
    """Elastic runs begin again where a process has failed, and resume from `output_dir`."""
    return "RDZV_ID" in os.environ and os.environ.get("MAX_RESTARTS", "0") != "0"


def _names_checkpoint(run: Any) -> bool:
    return run.training["resume_from_checkpoint"] not in (None, True, False, "true", "false")


def _keeps_shards(run: Any) -> bool:
    """The weights of ZeRO-3 would stay in the files of DeepSpeed."""
    return zero_stage(run) == 3 and zero_settings(deepspeed_settings(run)).get(GATHERS) is False


LAUNCH_RULES = Rules(
    (
        _needs_torchrun("deepspeed"),
        _needs_torchrun("fsdp"),
        Rule(
            ("deepspeed",),
            "does not gather the weights that ZeRO-3 shards, so there would be no model in output_dir",
            f"leave {GATHERS} out of its zero_optimization, or set it to true",
            _keeps_shards,
            for_rows=False,
        ),
        *(
            Rule(
                (key,),
                "is where all processes begin again when one has failed (MAX_RESTARTS), so what they trained is lost",
                "leave it out: they resume from the last checkpoint in output_dir",
                all_of(condition, _restarts),
                for_rows=False,
            )
            for key, condition in (
                ("overwrite_output_dir", is_set("training", "overwrite_output_dir")),
                ("resume_from_checkpoint", _names_checkpoint),
            )
        ),
        Rule(
            ("USE_V1",),
            "there is one engine only, with the same keys for all runs",
            "unset it; for each key of v1, `luthier check` says what to write instead",
            lambda run: is_on(os.environ, "USE_V1"),
            file="environment",
        ),
    )
)
