"""Programs that wait before they rename a file or folder to a certain name, until the test lets them go on.

So a test that kills one of their processes always finds them at the same place: a run before its third checkpoint has
its second one, and is not over.
"""

import os
from pathlib import Path

WAITS = Path(__file__).with_name("held")


class Hold:
    """`environment` is for programs that are to wait, and for those that they start."""

    def __init__(self, folder: Path, before: str) -> None:
        """`before`: the end of the name, such as `out/checkpoint-3`. `folder` must exist."""
        self.folder = folder
        paths = [str(WAITS), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {
            "PYTHONPATH": os.pathsep.join(paths),
            "TEST_HELD_BEFORE": before,
            "TEST_HELD_FOLDER": str(folder),
        }

    @property
    def holds(self) -> bool:
        """Whether a process is there."""
        return (self.folder / "is held").exists()

    def release(self) -> None:
        (self.folder / "goes on").touch()
