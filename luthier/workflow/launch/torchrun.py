"""Starts one process per accelerator with torchrun. The command is an argument list, so paths may contain spaces."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from luthier.config.sections import is_on
from luthier.core.errors import InvalidInput, RunFailed
from luthier.core.log import info
from luthier.core.machine import num_accelerators, num_cpus
from luthier.core.ports import free_port
from luthier.core.signals import end_with_parent
from luthier.workflow.launch.child import command_of

SHUTDOWN_SECONDS = 300
"""How long torchrun waits, after Ctrl-C or SIGTERM, for its processes to end the step and save a checkpoint."""


def launch_if_needed(argv: list[str]) -> int | None:
    """Run `luthier train ARGV` under torchrun if needed, and return its exit status; None if not needed.

    It is needed with FORCE_TORCHRUN, USE_MCA or USE_MEGATRON_BRIDGE, or if more than one accelerator is visible and
    USE_KT is off, in a process that no launcher has started.
    """
    if "LOCAL_RANK" in os.environ:
        return None
    if not any(is_on(os.environ, name) for name in ("FORCE_TORCHRUN", "USE_MCA", "USE_MEGATRON_BRIDGE")):
        if is_on(os.environ, "USE_KT"):  # KTransformers uses one process for all accelerators
            return None
        if num_accelerators() < 2:
            return None
    logs = Path(tempfile.mkdtemp(prefix="luthier-processes-"))
    arguments = torchrun_arguments(argv, logs, num_devices=None)
    info(f"starting torchrun {' '.join(arguments[:6])} ...")
    num_threads = max(1, num_cpus() // int(nproc_of(arguments)))
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    grow_segments()
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    # torch 2.13 tells where a shared store is in the first round only, and a machine that comes back waits for that.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    status = run_torchrun(arguments, logs)
    if status in (0, 130):
        shutil.rmtree(logs, ignore_errors=True)
    return status


def grow_segments() -> None:
    """Unless OPTIM_TORCH=0, the segments of GPU memory grow: batches differ in length, which fragments fixed ones."""
    if is_on({"OPTIM_TORCH": "1", **os.environ}, "OPTIM_TORCH") and "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # the name that torch < 2.9 reads


def run_torchrun(arguments: list[str], logs: Path) -> int:
    """Run torchrun in this process, so that a signal to this process reaches it, and through it all that train.

    Returns the status of the process that failed first, 130 if a signal stopped all of them, else 0. `logs`: see
    `torchrun_arguments`. Raises `RunFailed` if the machines of the run do not find each other.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    from luthier.workflow.launch.failed_processes import FailedProcesses

    try:
        run(parse_args(arguments))
    except SignalException:
        return 130
    except ChildFailedError as error:
        failed = FailedProcesses(error.failures, logs)
        for line in failed.report():
            print(f"luthier: {line}", file=sys.stderr)
        return failed.status
    except (RendezvousError, DistError) as error:
        raise RunFailed(f"the machines of this run could not meet, or one of them was lost: {error}") from error
    return 0


def end_with_launcher() -> None:
    """Ends this process as soon as the torchrun that started it has ended, even by SIGKILL (Linux).

    torchrun starts its processes in sessions of their own: they would train on, and write into the folder of the run
    that is started next. Does nothing in a process that torchrun did not start.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def nproc_of(arguments: list[str]) -> str:
    return arguments[arguments.index("--nproc-per-node") + 1]


def num_processes_here(asked: str | None) -> int:
    """How many processes of the run this machine starts. `asked`: NPROC_PER_NODE, in the words of torchrun.

    Raises `InvalidInput` for a value that is none.
    """
    match asked:
        case None:
            return max(1, num_accelerators())
        case "cpu":
            return num_cpus()
        case "auto":
            return num_accelerators() or num_cpus()
        case "gpu" if num_here := num_accelerators():
            return num_here
        case "gpu":
            raise InvalidInput("NPROC_PER_NODE: gpu: this machine has no accelerator -> write a number, or auto")
    if not (asked.isascii() and asked.isdigit() and int(asked)):
        raise InvalidInput(f"NPROC_PER_NODE: {asked}: should be a number of processes, or auto, gpu or cpu")
    return int(asked)


def torchrun_arguments(argv: list[str], logs: Path, num_devices: int | None) -> list[str]:
    """What follows `torchrun` on its command line, from the same environment variables as LLaMA-Factory.

    `logs`: the folder for the logs of processes. The first one writes to the terminal, and all others there.
    `num_devices`: processes to start unless NPROC_PER_NODE says so; None for one on each accelerator.
    """
    env = os.environ
    asked = env.get("NPROC_PER_NODE", None if num_devices is None else str(num_devices))
    arguments = ["--nproc-per-node", str(num_processes_here(asked))]
    if "RDZV_ID" in env:
        nodes = (
            f"{env['MIN_NNODES']}:{env['MAX_NNODES']}"
            if "MIN_NNODES" in env and "MAX_NNODES" in env
            else env.get("NNODES", "1")
        )
        arguments += ["--nnodes", nodes, "--rdzv-id", env["RDZV_ID"], "--rdzv-backend", "c10d"]
        arguments += ["--rdzv-endpoint", f"{env.get('MASTER_ADDR', '127.0.0.1')}:{env.get('MASTER_PORT', '29500')}"]
        arguments += ["--max-restarts", env.get("MAX_RESTARTS", "0")]
    else:
        arguments += ["--nnodes", env.get("NNODES", "1"), "--node-rank", env.get("NODE_RANK", "0")]
        arguments += [
            "--master-addr",
            env.get("MASTER_ADDR", "127.0.0.1"),
            "--master-port",
            env.get("MASTER_PORT", str(free_port())),
        ]
    others = ",".join(f"{number}:2" for number in range(1, int(nproc_of(arguments))))
    arguments += ["--log-dir", str(logs), *(["--redirects", others] if others else [])]
    return [*arguments, *command_of(["train", *argv])[1:]]
