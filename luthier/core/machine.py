"""What this process runs on: device, number formats, memory, rank in a distributed run."""

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from luthier.core.importing import without_collection


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    device: str
    """Device type: `cpu`, `cuda`, `mps`, `xpu`, `npu`, ..."""
    num_accelerators: int
    """Accelerators visible to this process; 0 on a CPU machine."""
    bf16: bool
    """Whether bfloat16 runs in hardware. Without that, a CPU computes bfloat16 more slowly than float32."""
    fp16: bool
    """Whether float16 runs in hardware with a gradient scaler; no CPU does."""
    memory_bytes: int
    """Memory of the host."""
    device_memory_bytes: int
    """Memory of one accelerator, or of the host if there is none."""
    num_cpus: int
    """CPUs that this process may use; the host may have more."""
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int | None = None
    """Processes of the run on this host; None for all of them."""
    is_assumed: bool = False
    """A plan is made for it, and it is not here."""


def num_accelerators() -> int:
    """Those that this process sees. Unlike `detect`, it takes no memory of them. Imports torch."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.accelerator.device_count() if accelerator is not None else 0


def num_cpus() -> int:
    """Those that this process may use; the host may have more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def detect() -> Machine:
    """The machine, detected once. Imports torch."""
    with without_collection():
        import torch

    local = os.environ.get("LOCAL_WORLD_SIZE")
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = accelerator.type if accelerator is not None else "cpu"
    if device == "cuda":
        bf16, device_memory_bytes = torch.cuda.is_bf16_supported(including_emulation=False), _cuda_memory_bytes()
    elif device == "cpu":
        bf16, device_memory_bytes = cpu_has_bf16(), memory_bytes
    else:
        bf16, device_memory_bytes = True, memory_bytes
    return Machine(
        device=device,
        num_accelerators=num_accelerators(),
        bf16=bf16,
        fp16=device != "cpu",
        memory_bytes=memory_bytes,
        device_memory_bytes=device_memory_bytes,
        num_cpus=num_cpus(),
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_world_size=int(local) if local else None,
    )


def _cuda_memory_bytes() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def cpu_has_bf16() -> bool:
    """AVX-512 BF16 on x86, BF16 on Arm, as listed by the kernel; torch has no public function for it."""
    return any(line.startswith(("flags", "Features")) and "bf16" in line for line in _cpu_lines())


def has_amd_cpu() -> bool:
    return any(line.startswith("vendor_id") and "AuthenticAMD" in line for line in _cpu_lines())


def _cpu_lines() -> list[str]:
    """What Linux tells about the processors; other systems have no such file."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Memory this process can still allocate: free or reclaimable memory plus swap, within the limits of its control
    group and its own. None if the system does not report it. `root` holds `proc` and `sys`."""
    meminfo = _read(root / "proc/meminfo")
    sizes = {name: int(kilobytes) * 1024 for name, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB", meminfo, re.M)}
    if "MemAvailable" not in sizes:
        return None
    free = [sizes["MemAvailable"] + sizes.get("SwapFree", 0), *_control_group_free_bytes(root)]
    if (own := _own_limit_free_bytes(root)) is not None:
        free.append(own)
    return max(min(free), 0)


def _control_group_free_bytes(root: Path) -> list[int]:
    """Free bytes under each limit, from the group of this process up. File cache counts as free."""
    line = re.search(r"^0::(/.*)$", _read(root / "proc/self/cgroup"), re.M)
    groups = root / "sys/fs/cgroup"
    folder = groups / line[1].lstrip("/") if line else groups
    found = []
    for group in (folder, *folder.parents):
        if not group.is_relative_to(groups):
            break
        limit, used = _read(group / "memory.max").strip(), _read(group / "memory.current").strip()
        if limit.isdigit() and used.isdigit():
            cached = re.search(r"^inactive_file (\d+)$", _read(group / "memory.stat"), re.M)
            found.append(int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return found


def _own_limit_free_bytes(root: Path) -> int | None:
    """Address space left under `ulimit -v`, or None without that limit."""
    limit = re.search(r"^Max address space\s+(\d+)", _read(root / "proc/self/limits"), re.M)
    used = re.search(r"^VmSize:\s+(\d+) kB", _read(root / "proc/self/status"), re.M)
    return int(limit[1]) - int(used[1]) * 1024 if limit and used else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
