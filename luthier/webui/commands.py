"""Commands that answer a question about the text of a run file, each as a process of its own: some need torch."""

import asyncio
import contextlib
import os
import sys
import tempfile
from pathlib import Path

from luthier.core.errors import RunFailed

SECONDS = 300.0
"""A command that takes longer is given up."""


async def plan_of(text: str) -> str:
    """What `luthier plan` prints. Raises `RunFailed` with what it says instead."""
    with tempfile.TemporaryDirectory(prefix="luthier-plan-") as folder:
        return await _output(Path(folder), text, "plan")


async def doctor_of(text: str) -> str:
    """What the doctor finds in the datasets. Raises `RunFailed`."""
    with tempfile.TemporaryDirectory(prefix="luthier-data-") as folder:
        return await _output(Path(folder), text, "data", "--doctor")


async def rows_of(text: str, num_rows: int) -> str:
    """The first rows with their tokens and labels, as a page of HTML. Raises `RunFailed`."""
    with tempfile.TemporaryDirectory(prefix="luthier-data-") as folder:
        path = Path(folder, "rows.html")
        await _output(Path(folder), text, "data", "--limit", str(num_rows), "--html", str(path))
        return path.read_text(encoding="utf-8")


async def _output(folder: Path, text: str, command: str, *words: str) -> str:
    """The process is ended if the caller does not want its answer any more."""
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "luthier", command, str(path), *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "LLAMAFACTORY_VERBOSITY": "ERROR"},
    )
    try:
        async with asyncio.timeout(SECONDS):
            out, errors = await process.communicate()
    except TimeoutError:
        raise RunFailed(f"{command}: it took longer than {SECONDS:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    if process.returncode != 0:
        raise RunFailed(errors.decode("utf-8", "replace").strip().replace(str(path), "run.yaml"))
    return out.decode("utf-8", "replace").rstrip()
