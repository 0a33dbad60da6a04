"""Starts one process per accelerator with torchrun. The command is an argument list, so paths may contain spaces."""

import os
import subprocess
import sys

from luthier.config.sections import is_on
from luthier.core.log import info


def launch_if_needed(argv: list[str]) -> int | None:
    """Run `luthier train ARGV` under torchrun if needed, and return its exit status; None if not needed.

    It is needed with FORCE_TORCHRUN, or if more than one accelerator is visible and USE_KT is off, in a process that no
    launcher has started.
    """
    if "LOCAL_RANK" in os.environ:
        return None
    if not is_on(os.environ, "FORCE_TORCHRUN"):
        if is_on(os.environ, "USE_KT"):  # KTransformers uses one process for all accelerators
            return None
        from luthier.core.machine import detect

        if detect().num_accelerators < 2:
            return None
    command = torchrun_command(argv, num_devices=None)
    info(f"starting {' '.join(command[:8])} ...")
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(nproc_of(command)))))
    return subprocess.run(command, env=environment, check=False).returncode


def nproc_of(command: list[str]) -> str:
    return command[command.index("--nproc-per-node") + 1]


def torchrun_command(argv: list[str], num_devices: int | None) -> list[str]:
    """The torchrun command, from the same environment variables as LLaMA-Factory."""
    env = os.environ
    if num_devices is None and "NPROC_PER_NODE" not in env:
        from luthier.core.machine import detect

        num_devices = max(1, detect().num_accelerators)
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", env.get("NPROC_PER_NODE", str(num_devices))]
    if "RDZV_ID" in env:
        nodes = (
            f"{env['MIN_NNODES']}:{env['MAX_NNODES']}"
            if "MIN_NNODES" in env and "MAX_NNODES" in env
            else env.get("NNODES", "1")
        )
        command += ["--nnodes", nodes, "--rdzv-id", env["RDZV_ID"], "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", f"{env.get('MASTER_ADDR', '127.0.0.1')}:{env.get('MASTER_PORT', '29500')}"]
        command += ["--max-restarts", env.get("MAX_RESTARTS", "0")]
    else:
        command += ["--nnodes", env.get("NNODES", "1"), "--node-rank", env.get("NODE_RANK", "0")]
        command += [
            "--master-addr",
            env.get("MASTER_ADDR", "127.0.0.1"),
            "--master-port",
            env.get("MASTER_PORT", free_port()),
        ]
    return [*command, "-m", "luthier", "train", *argv]


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
