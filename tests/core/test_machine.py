"""This machine, and how much memory is free, from the files in which Linux says so."""

from pathlib import Path

from luthier.core.machine import available_memory_bytes, detect

GB = 1024**3


def system(root: Path, **files: str) -> Path:
    texts = {"proc/meminfo": f"MemTotal: {64 * GB // 1024} kB\nMemAvailable: {8 * GB // 1024} kB\nSwapFree: 1024 kB\n"}
    for name, text in (texts | {name.replace("__", "/"): text for name, text in files.items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_free_memory_and_swap(tmp_path):
    assert available_memory_bytes(system(tmp_path)) == 8 * GB + 1024**2


def test_the_limit_of_a_control_group_or_of_one_above(tmp_path):
    root = system(tmp_path, proc__self__cgroup="0::/a/b\n")
    group = root / "sys/fs/cgroup/a"
    (group / "b").mkdir(parents=True)
    (group / "b" / "memory.max").write_text("max\n")
    (group / "b" / "memory.current").write_text("5\n")
    (group / "memory.max").write_text(f"{4 * GB}\n")
    (group / "memory.current").write_text(f"{3 * GB}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {GB // 2}\n")
    assert available_memory_bytes(root) == GB + GB // 2


def test_the_limit_of_the_process(tmp_path):
    limits = f"Limit  Soft Limit  Hard Limit  Units\nMax address space         {3 * GB}   unlimited   bytes\n"
    root = system(tmp_path, proc__self__limits=limits, proc__self__status=f"VmSize:   {GB // 1024} kB\n")
    assert available_memory_bytes(root) == 2 * GB
    (root / "proc/self/limits").write_text("Max address space         unlimited   unlimited   bytes\n")
    assert available_memory_bytes(root) == 8 * GB + 1024**2


def test_a_system_that_does_not_tell(tmp_path):
    assert available_memory_bytes(tmp_path) is None


def test_this_machine():
    available = available_memory_bytes()
    assert available is None or available > 10**8


def test_this_machine_is_described():
    machine = detect()
    assert machine.memory_bytes > 1e9
    assert machine.num_cpus >= 1
    assert (machine.num_accelerators == 0) == (machine.device == "cpu")
    assert machine is detect()
