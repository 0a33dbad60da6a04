"""`luthier plan` for the text of a run file, as a process of its own, since it needs torch."""

import asyncio
import contextlib
import os
import sys
import tempfile
from pathlib import Path

from luthier.core.errors import RunFailed

SECONDS = 300.0
"""A plan that takes longer is given up."""


async def plan_of(text: str) -> str:
    """What `luthier plan` prints. Raises `RunFailed` with what it says instead.

    The process is ended if the caller does not want the plan any more.
    """
    with tempfile.TemporaryDirectory(prefix="luthier-plan-") as folder:
        path = Path(folder, "run.yaml")
        path.write_text(text, encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "luthier", "plan", str(path)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "LLAMAFACTORY_VERBOSITY": "ERROR"},
        )
        try:
            async with asyncio.timeout(SECONDS):
                out, errors = await process.communicate()
        except TimeoutError:
            raise RunFailed(f"plan: it took longer than {SECONDS:.0f} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    if process.returncode != 0:
        raise RunFailed(errors.decode("utf-8", "replace").strip().replace(str(path), "run.yaml"))
    return out.decode("utf-8", "replace").rstrip()
