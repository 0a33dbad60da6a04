"""Rules about steps that are NaN or infinite, and about the time that a signal leaves."""

from luthier.config.rules.engine import Condition, Rule, Rules, When, above, at_least, is_other_than, is_set, warning

GOES_ON = When(is_other_than("recovery", "on_nonfinite", "stop"))
_goes_back = When(lambda run: run.recovery.on_nonfinite == "rollback")
_EARLY_UPDATE = "leaves out the update of a step, which is applied during the backward pass with"
_KEEP_ONE = "set on_nonfinite: stop, or leave the other out"


RECOVERY_RULES = Rules(
    (
        GOES_ON.refuses(
            ("on_nonfinite", "deepspeed"), f"{_EARLY_UPDATE} deepspeed", _KEEP_ONE, is_set("training", "deepspeed")
        ),
        GOES_ON.refuses(
            ("on_nonfinite", "optim"),
            f"{_EARLY_UPDATE} LOMO",
            "set on_nonfinite: stop, or another optim",
            lambda run: run.training["optim"] in ("lomo", "adalomo"),
        ),
        _goes_back.refuses(
            ("on_nonfinite", "save_strategy"),
            "goes back to the last checkpoint, and this run saves none",
            "set save_strategy: steps with save_steps, or on_nonfinite: skip",
            lambda run: run.training["save_strategy"] == "no",
        ),
        _goes_back.refuses(
            ("on_nonfinite", "save_only_model"),
            "takes the state of the optimizer from the last checkpoint, and save_only_model leaves it out",
            "leave save_only_model out, or set on_nonfinite: skip",
            is_set("training", "save_only_model"),
        ),
        warning(
            ("max_nonfinite_steps", "on_nonfinite"),
            "is not read here, since on_nonfinite: stop ends the run at the first such step",
            "set on_nonfinite: skip or rollback",
            lambda run: "max_nonfinite_steps" in run.changed and run.recovery.on_nonfinite == "stop",
        ),
        at_least("recovery", "max_nonfinite_steps", 0),
        above("recovery", "save_on_signal_seconds", 0),
    )
)


def applies_update_early(key: str, is_on: Condition) -> Rule:
    """Of an optimizer that updates weights during the backward pass if `key` is on."""
    return GOES_ON.refuses(("on_nonfinite", key), f"{_EARLY_UPDATE} {key}", _KEEP_ONE, is_on)
