"""The libraries that a training run has in memory: imported for the plan too, which measures what they take."""

import importlib
from typing import TYPE_CHECKING

from luthier.core.kinds import QUANTIZERS

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun

OF_TRAINING = ("luthier.training.trainer", "luthier.training.fit", "luthier.workflow.parts")


def import_what_training_needs(run: "TrainRun") -> None:
    names = list(OF_TRAINING)
    if run.quantization.quantization_bit is not None:
        names += QUANTIZERS.get(run.quantization.quantization_method).libraries
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            if name in OF_TRAINING:
                raise
            continue  # the library may be on the machine that trains only
