"""Rules about runs whose processes Ray starts. The keys are read with USE_RAY=1 only, and so are these rules."""

import os
import re
from typing import Any

from luthier.config.rules.engine import Condition, Rule, Rules, When, all_of
from luthier.config.sections import is_on


def under_ray(run: Any) -> bool:
    return is_on(os.environ, "USE_RAY")


def _value(key: str, is_wrong: Condition) -> Condition:
    return lambda run: is_wrong(getattr(run.ray, key))


def _has_bad_amount(resources: dict[str, Any] | None) -> bool:
    amounts = (resources or {}).values()
    return any(isinstance(amount, bool) or not isinstance(amount, int | float) or amount < 0 for amount in amounts)


def _restarts_without_number(run: Any) -> bool:
    return re.fullmatch(r"-1|\d+", os.environ.get("MAX_RESTARTS", "0")) is None


_ray = When(under_ray)

RAY_RULES = Rules(
    (
        Rule(
            ("USE_RAY",),
            "both Ray and torchrun would start the processes",
            "unset FORCE_TORCHRUN, or unset USE_RAY",
            all_of(under_ray, lambda run: is_on(os.environ, "FORCE_TORCHRUN")),
            file="environment",
        ),
        Rule(
            ("MAX_RESTARTS",),
            "must be a number: how often all processes start again, or -1 for as often as it takes",
            "set a number, or unset it",
            all_of(under_ray, _restarts_without_number),
            file="environment",
        ),
        _ray.refuses(
            ("ray_num_workers",),
            "must be at least 1",
            "set the number of processes that train",
            _value("ray_num_workers", lambda number: number < 1),
        ),
        _ray.refuses(
            ("master_port",),
            "must be the number of a port",
            "leave it out to let a free one be found",
            _value("master_port", lambda port: port is not None and not (port.isdecimal() and 0 < int(port) < 65536)),
        ),
        _ray.refuses(
            ("resources_per_worker",),
            "must name amounts, which are numbers from 0 on",
            "write for example {CPU: 4, GPU: 1}",
            _value("resources_per_worker", _has_bad_amount),
        ),
    )
)
