"""SwanLab, set up from the run file: its callback for transformers, the login and messages to Lark."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from luthier.config.keys.swanlab import MINIMUM, SwanlabConfig
from luthier.core.errors import MissingExtra, RunFailed
from luthier.core.files import write_atomically
from luthier.core.log import is_main_process
from luthier.core.versions import is_installed

PUBLIC_FILE = "swanlab_public_config.json"
"""Where to find the run in SwanLab; written to the output folder."""


def swanlab_callbacks(keys: SwanlabConfig, run_name: str | None) -> list[TrainerCallback]:
    """Logs in if an API key is given. `run_name` is used without `swanlab_run_name`.

    Raises `MissingExtra` without the library, `RunFailed` if the login fails.
    """
    if not is_installed("swanlab"):
        raise MissingExtra(f"use_swanlab: true needs the library swanlab: pip install '{MINIMUM}'")
    import swanlab
    from swanlab.integration.transformers import SwanLabCallback

    if keys.swanlab_api_key and keys.swanlab_mode == "cloud" and is_main_process():
        log_in(keys.swanlab_api_key)
    if keys.swanlab_lark_webhook_url and is_main_process():
        from swanlab.plugin.notification import LarkCallback

        swanlab.merge_callbacks([LarkCallback(keys.swanlab_lark_webhook_url, keys.swanlab_lark_secret)])
    tracker = SwanLabCallback(
        project=keys.swanlab_project,
        workspace=keys.swanlab_workspace,
        experiment_name=keys.swanlab_run_name or run_name,
        mode=keys.swanlab_mode,
        log_dir=keys.swanlab_logdir,
        tags=["luthier"],
    )
    return [tracker, PublicFile()]


def log_in(api_key: str) -> None:
    import swanlab
    from swanlab.exceptions import ApiError, AuthenticationError

    try:
        swanlab.login(api_key=api_key)
    except (ApiError, AuthenticationError, OSError) as fault:
        reason = str(fault).replace(api_key, "***")
        raise RunFailed(
            f"swanlab_api_key: login to SwanLab failed ({reason}) -> check the key and the network, or set"
            " swanlab_mode: local"
        ) from fault


class PublicFile(TrainerCallback):
    """Writes `PUBLIC_FILE`. Must run after SwanLab's callback, which starts the run."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        import swanlab

        run = swanlab.get_run()
        facts = {"id": run.id, "name": run.name, "mode": run.mode, "dir": str(run.dir)}
        if run.mode == "online":
            facts |= {"path": run.path, "url": run.url}
        write_atomically(Path(args.output_dir, PUBLIC_FILE), json.dumps(facts, indent=2) + "\n")
