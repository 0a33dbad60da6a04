"""Keys of the tracker SwanLab; `report_to: swanlab` reaches it through transformers."""

from dataclasses import dataclass
from typing import Literal

from luthier.config.fields import refused


@dataclass(frozen=True, slots=True, kw_only=True)
class SwanlabConfig:
    use_swanlab: bool = refused(
        False, "SwanLab has no keys of its own in this version", "use report_to: swanlab, and its SWANLAB_* variables"
    )
    """Report to SwanLab."""
    swanlab_project: str | None = "llamafactory"
    """Project in SwanLab that the run belongs to."""
    swanlab_workspace: str | None = None
    """Workspace in SwanLab that the project belongs to."""
    swanlab_run_name: str | None = None
    """Name of the run in SwanLab."""
    swanlab_mode: Literal["cloud", "local"] = "cloud"
    """Where the records are kept."""
    swanlab_api_key: str | None = None
    """Key of the account. Never printed."""
    swanlab_logdir: str | None = None
    """Folder for local records."""
    swanlab_lark_webhook_url: str | None = None
    """Address to send Lark messages to."""
    swanlab_lark_secret: str | None = None
    """Secret for Lark messages. Never printed."""
