"""Keys of the tracker SwanLab; without them, `report_to: swanlab` reaches it with its own SWANLAB_* variables."""

from dataclasses import dataclass
from typing import Literal

MINIMUM = "swanlab>=0.10"
"""What the keys need; earlier releases call the folder of the records something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwanlabConfig:
    use_swanlab: bool = False
    """Report to SwanLab."""
    swanlab_project: str | None = "llamafactory"
    """Project in SwanLab that the run belongs to."""
    swanlab_workspace: str | None = None
    """Workspace in SwanLab that the project belongs to."""
    swanlab_run_name: str | None = None
    """Name of the run in SwanLab; unset takes `run_name`, or a name that SwanLab makes."""
    swanlab_mode: Literal["cloud", "local"] = "cloud"
    """Where the records are kept."""
    swanlab_api_key: str | None = None
    """Key of the account. Never printed."""
    swanlab_logdir: str | None = None
    """Folder for local records."""
    swanlab_lark_webhook_url: str | None = None
    """Address to send Lark messages to. Never printed."""
    swanlab_lark_secret: str | None = None
    """Secret for Lark messages. Never printed."""
