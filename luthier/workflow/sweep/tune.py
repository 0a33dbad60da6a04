"""The runs of a sweep through Ray Tune (USE_RAY=1): as many at a time as the cluster has room for.

A trial is a process of `luthier train`, as in a sweep without Ray, so its folder is that of an ordinary run. On a
cluster, all nodes share the folder of the sweep.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.core.errors import RunFailed
from luthier.core.log import info
from luthier.workflow.launch.ray import environment_of_driver, gist, require_resources, resources_of, start_ray
from luthier.workflow.launch.ray_worker import metrics_of
from luthier.workflow.sweep.grid import GridRun
from luthier.workflow.sweep.one_run import RunProcess


def run_with_tune(left: Sequence[GridRun], root: Path) -> None:
    """Runs those of `left`. What became of each is in its folder. Raises `RunFailed` if one could not be started.

    A trial has what `ray_num_workers` processes need, and starts them through torchrun if it has several accelerators.
    """
    if not left:
        return
    keys = left[0].run.ray
    ray = start_ray(keys)
    from ray import tune

    cluster = ray.cluster_resources()
    each = {name: keys.ray_num_workers * amount for name, amount in resources_of(keys, cluster).items()}
    require_resources(1, each, cluster)
    storage = Path(keys.ray_storage_path or root / ".ray").expanduser().absolute()
    # As parameters and not as the configuration of a trial, which Ray writes down: there are secrets among them.
    runs = {one.name: (str(one.folder.absolute()), one.keys()) for one in left}
    function = tune.with_parameters(trial, runs=runs, environment=environment_of_driver(), folder=os.getcwd())
    info(f"Ray Tune: {len(runs)} runs with {each} each, on {len(ray.nodes())} nodes")
    found = tune.Tuner(
        tune.with_resources(function, each),
        param_space={"name": tune.grid_search(list(runs))},
        tune_config=tune.TuneConfig(trial_name_creator=_name, trial_dirname_creator=_name),
        run_config=tune.RunConfig(name=keys.ray_run_name or root.name, storage_path=str(storage), verbose=1),
    ).fit()
    if keys.ray_storage_path is None:
        shutil.rmtree(storage, ignore_errors=True)
    if found.errors:
        raise RunFailed(f"Ray Tune: {gist(found.errors[0])} -> see the log above, then run the same command again")


def _name(running: Any) -> str:
    return str(running.config["name"])


def trial(
    config: Mapping[str, Any],
    runs: Mapping[str, tuple[str, Mapping[str, Any]]],
    environment: Mapping[str, str],
    folder: str,
) -> None:
    """The function of each trial. A run that fails is no failure of the trial: its folder says why.

    `runs`: name -> folder and keys. `environment` and `folder`: of the driver.
    """
    from ray import tune

    if os.path.isdir(folder):
        os.chdir(folder)
    os.environ.update(environment)
    run_folder, keys = runs[config["name"]]
    with RunProcess(Path(run_folder), keys) as process:
        state = process.wait()
    tune.report({"state": state, **metrics_of(Path(run_folder))})
