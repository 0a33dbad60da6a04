"""Keys of a run whose processes Ray starts (USE_RAY=1)."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    ray_num_workers: int = 1
    """Number of processes that train, each with one accelerator if the cluster has any."""
    ray_init_kwargs: dict[str, Any] | None = None
    """Arguments of `ray.init`, as a mapping or JSON text. `address` names a cluster, as
    RAY_ADDRESS does; else Ray starts here."""
    master_addr: str | None = None
    """Host that the processes meet at; by default that of the first of them."""
    master_port: str | None = None
    """Port that the processes meet at; by default a free one."""
    ray_run_name: str | None = None
    """Name of the run in Ray; by default it has the time in it."""
    ray_storage_path: str | None = None
    """Folder of Ray's own notes on the run, which all nodes share; by default `output_dir` with `.ray` appended."""
    placement_strategy: Literal["SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK"] = "PACK"
    """How processes are put on nodes: on few of them (PACK) or on many (SPREAD); STRICT_: on
    one, or each on its own."""
    resources_per_worker: dict[str, Any] | None = None
    """What Ray reserves for each process, e.g. {CPU: 4, GPU: 1}."""


RAY_KEYS = tuple(RayConfig.__dataclass_fields__)
"""They say how a run is started, and nothing of what it computes."""
