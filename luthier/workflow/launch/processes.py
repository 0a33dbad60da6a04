"""What a run may not do because it has several processes, told before they are started."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from luthier.config.load import locate
from luthier.config.rules.table import broken_rules
from luthier.config.runs import TrainRun
from luthier.config.sections import is_on
from luthier.config.source import Written
from luthier.core.errors import ConfigError


def num_processes_asked(run: TrainRun, environment: Mapping[str, str] = os.environ) -> int | None:
    """That Ray would start (`ray_num_workers`), or torchrun: NPROC_PER_NODE on each of NNODES; None where they do not
    say (`gpu`, `auto`)."""
    if is_on(environment, "USE_RAY"):
        return run.ray.ray_num_workers
    per_node, nodes = environment.get("NPROC_PER_NODE", ""), environment.get("NNODES", "").rpartition(":")[2]
    if not per_node.isdecimal():
        return None
    return max(int(per_node) * int(nodes if nodes.isdecimal() else 1), 1)


@contextmanager
def in_one_of(num_processes: int) -> Iterator[None]:
    """While open, rules find what torchrun tells each of so many processes."""
    name, before = "WORLD_SIZE", os.environ.get("WORLD_SIZE")
    os.environ[name] = str(num_processes)
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def require_allowed(run: TrainRun, written: Written, num_processes: int) -> None:
    """Raises the `ConfigError` with which each of so many processes of `luthier train` would end."""
    with in_one_of(num_processes):
        refusing = [rule for rule in broken_rules("train", run, writes=False) if not (rule.only_warns or rule.is_local)]
    if refusing:
        raise ConfigError(run.source, [locate(rule.problem(), written) for rule in refusing], run.warnings)
