"""A training run whose processes Ray starts, on this machine or on a cluster (USE_RAY=1).

    driver                    `luthier train`: this module
    TorchTrainer's workers    one for each process; they reserve the resources, and restart together if one fails
    processes                 `luthier train` in each worker (`ray_worker`), with the variables that torchrun would set

Why a process in each worker: a worker runs functions in a thread, where no signal arrives, so no Ctrl-C could save a
checkpoint; and a process is the same that torchrun starts, to the bit.
"""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from luthier.config.keys.ray import RAY_KEYS
from luthier.core.errors import InvalidInput, RunFailed
from luthier.core.log import info, warn
from luthier.core.manifest import MANIFEST_NAME
from luthier.core.ports import free_port
from luthier.core.versions import require
from luthier.workflow.launch.ray_worker import INTERRUPTED, Endings, work
from luthier.workflow.launch.run_files import run_file

if TYPE_CHECKING:
    from luthier.config.keys.ray import RayConfig
    from luthier.config.runs import TrainRun

MAX_RESTARTS = 3
"""How often all processes start again after one has failed, unless the environment variable MAX_RESTARTS says."""
OF_A_NODE = {
    *("PATH", "HOME", "USER", "LOGNAME", "HOSTNAME", "PWD", "OLDPWD", "SHLVL", "_", "TMPDIR", "LD_LIBRARY_PATH"),
    *("PYTHONPATH", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"),
    "USE_RAY",
}
"""Environment variables of which each node has its own; all others are those of the driver, as in the reference."""
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class RayResult:
    status: int
    """The exit status of the processes: 0, or 130 if a signal stopped them after a checkpoint."""
    printed: str = ""
    """What the first process printed to stdout: the metrics, and where they are saved."""


def start_ray(keys: "RayConfig") -> Any:
    """The module `ray`, connected to the cluster that is named, or started here. Raises `InvalidInput`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers about each run
    ray = require("ray", "ray", "USE_RAY=1")
    if ray.is_initialized():
        return ray
    given: Mapping[str, Any] = keys.ray_init_kwargs or {}
    joins = given.get("address", os.environ.get("RAY_ADDRESS", "local")) != "local"
    defaults: dict[str, Any] = {"logging_level": "warning"} | ({} if joins else {"include_dashboard": False})
    try:
        ray.init(**{**defaults, **given})
    except (TypeError, ValueError, ConnectionError, RuntimeError) as fault:
        first = next(iter(str(fault).splitlines()), type(fault).__name__)
        raise InvalidInput(
            f"ray_init_kwargs: Ray cannot be started ({first}) -> correct the address of the cluster, its token"
            " (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN) and the other arguments of ray.init, or leave them out to start Ray"
            " on this machine"
        ) from fault
    except OSError as fault:
        raise InvalidInput(
            f"USE_RAY=1: Ray cannot be started ({fault}) -> set TMPDIR to a folder with a short path and room"
        ) from fault
    return ray


def resources_of(keys: "RayConfig", cluster: Mapping[str, float]) -> dict[str, float]:
    """What each process gets: as asked, else a CPU, and an accelerator if the cluster has any."""
    if keys.resources_per_worker is not None:
        return {"CPU": 1, **keys.resources_per_worker}
    return {"CPU": 1, "GPU": 1} if cluster.get("GPU", 0) else {"CPU": 1}


def require_resources(num_workers: int, each: Mapping[str, float], cluster: Mapping[str, float]) -> None:
    """Raises `InvalidInput` if the whole cluster has less than the processes need: Ray would wait forever."""
    for name, amount in each.items():
        if num_workers * amount > cluster.get(name, 0):
            raise InvalidInput(
                f"ray_num_workers: {num_workers} processes with {name}: {amount:g} each need {num_workers * amount:g},"
                f" and the cluster has {cluster.get(name, 0):g} -> set fewer, or smaller resources_per_worker"
            )


def train_with_ray(run: "TrainRun") -> RayResult:
    """Raises the error of the processes, if Ray cannot start them or none of their restarts helped."""
    ray = start_ray(run.ray)
    cluster = ray.cluster_resources()
    each = resources_of(run.ray, cluster)
    require_resources(run.ray.ray_num_workers, each, cluster)
    output_dir = Path(run.training["output_dir"]).absolute()
    storage = Path(run.ray.ray_storage_path or f"{output_dir}.ray").expanduser().absolute()
    endings = ray.remote(Endings).options(num_cpus=0).remote(run.ray.ray_num_workers)
    trainer = _trainer(run, each, storage, _work_of(run, output_dir, endings))
    info(f"Ray: {run.ray.ray_num_workers} processes with {each} each, on {len(ray.nodes())} nodes")
    fault = _fit(trainer, lambda: endings.ask_to_stop.remote())
    status, message, printed = ray.get(endings.result.remote())
    if run.ray.ray_storage_path is None:
        shutil.rmtree(storage, ignore_errors=True)
    if status == INTERRUPTED:
        info(message or "stopped before training began")
    elif message:
        raise (InvalidInput if status == InvalidInput.exit_status else RunFailed)(message)
    if fault is not None:
        from ray.train import TrainingFailedError

        restarts = "; all restarts are used up (MAX_RESTARTS)" if isinstance(fault, TrainingFailedError) else ""
        raise RunFailed(f"Ray: {gist(fault)}{restarts} -> see the log above") from fault
    return RayResult(status, printed)


def gist(fault: BaseException) -> str:
    """The last line of an error of Ray, which is that of the error in a worker."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return lines[-1] if lines else type(fault).__name__


def _work_of(run: "TrainRun", output_dir: Path, endings: Any) -> dict[str, Any]:
    """The argument of `ray_worker.work`."""
    keys = {name: value for name, value in run.given.items() if name not in RAY_KEYS} | {"output_dir": str(output_dir)}
    file = run_file(keys)
    return {
        "keys": keys,
        "environment": {**environment_of_driver(), **file.environment},
        "folder": os.getcwd(),
        "endings": endings,
        "earlier": {
            path.parent.name: path.stat().st_mtime_ns for path in output_dir.glob(f"checkpoint-*/{MANIFEST_NAME}")
        },
    }


def environment_of_driver() -> dict[str, str]:
    """The variables of this process that its processes on other nodes get."""
    return {name: value for name, value in os.environ.items() if name not in OF_A_NODE and not name.startswith("RAY_")}


def _trainer(run: "TrainRun", each: Mapping[str, float], storage: Path, config: Mapping[str, Any]) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    keys = run.ray
    return TorchTrainer(
        work,
        train_loop_config=dict(config),
        torch_config=_meeting_place(keys.master_addr, keys.master_port),
        scaling_config=ScalingConfig(
            num_workers=keys.ray_num_workers,
            use_gpu=each.get("GPU", 0) > 0,
            resources_per_worker=dict(each),
            placement_strategy=keys.placement_strategy,
        ),
        run_config=RunConfig(
            name=keys.ray_run_name or f"{Path(run.training['output_dir']).name}-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=int(os.environ.get("MAX_RESTARTS", MAX_RESTARTS))),
        ),
    )


def _meeting_place(address: str | None, port: str | None) -> Any:
    """A TorchConfig that tells the workers where their processes meet; these make the process group themselves."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class MeetingPlace(Backend):
        share_cuda_visible_devices = True  # LOCAL_RANK chooses among the devices of a node

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            found = worker_group.execute_single(0, _address_and_port)
            host, number = address or found[0], port or found[1]
            worker_group.execute(_set_address, host, number)

    class OfProcesses(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return MeetingPlace

        @property
        def train_func_context(self) -> Any:
            return nullcontext

    return OfProcesses()


def _address_and_port() -> tuple[str, str]:
    import ray

    return ray.util.get_node_ip_address(), str(free_port())


def _set_address(host: str, port: str) -> None:
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=port)


def _fit(trainer: Any, ask_to_stop: Any) -> BaseException | None:
    """Runs in a thread, since Ray takes Ctrl-C for the wish to leave at once. Returns why Ray gave up, if it did."""
    faults: list[BaseException | None] = []

    def fit() -> None:
        from ray.train import TrainingFailedError

        with suppress(TrainingFailedError):  # any other fault is printed with its traceback too
            try:
                trainer.fit()
            finally:
                faults.append(sys.exception())

    def stop(number: int, frame: FrameType | None) -> None:
        warn("stopping after this step and saving a checkpoint; press Ctrl-C again to stop at once")
        ask_to_stop()

    thread = threading.Thread(target=fit, daemon=True, name="ray")
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return faults[0]
