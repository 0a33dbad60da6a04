"""A whole run, checked and frozen, as commands receive it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.config.keys.bridge import BridgeConfig
from luthier.config.keys.data import DataConfig
from luthier.config.keys.engines import SglangConfig, VllmConfig
from luthier.config.keys.evaluate import EvalConfig, EvalTasksConfig
from luthier.config.keys.export import ExportConfig
from luthier.config.keys.finetuning import FinetuningConfig
from luthier.config.keys.fp8 import Fp8Config
from luthier.config.keys.generate import GeneratingConfig
from luthier.config.keys.ktransformers import KTransformersConfig
from luthier.config.keys.mcore import McoreConfig
from luthier.config.keys.model import ModelConfig
from luthier.config.keys.parallel import ParallelConfig
from luthier.config.keys.processor import ProcessorConfig
from luthier.config.keys.profiling import ProfilerConfig
from luthier.config.keys.quantization import QuantizationConfig
from luthier.config.keys.ray import RayConfig
from luthier.config.keys.recovery import RecoveryConfig
from luthier.config.keys.swanlab import SwanlabConfig
from luthier.config.keys.training import TrainingKeys
from luthier.core.errors import Problem

if TYPE_CHECKING:
    from luthier.model.features.liger import LigerConfig
    from luthier.model.features.mixture_of_depths import MixtureOfDepthsConfig
    from luthier.model.features.new_tokens import NewTokensConfig
    from luthier.model.features.rope_scaling import RopeScalingConfig
    from luthier.model.features.router_balance import RouterBalanceConfig
    from luthier.model.features.shifted_attention import ShiftedAttentionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """The keys of each file in luthier/model/features/, under its name."""

    liger: "LigerConfig"
    mixture_of_depths: "MixtureOfDepthsConfig"
    new_tokens: "NewTokensConfig"
    rope_scaling: "RopeScalingConfig"
    router_balance: "RouterBalanceConfig"
    shifted_attention: "ShiftedAttentionConfig"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What every run has."""

    source: str
    """The run file, or a phrase that says where the keys come from."""
    stage: str
    finetuning_type: str
    model: ModelConfig
    features: Features
    quantization: QuantizationConfig
    data: DataConfig
    processor: ProcessorConfig
    finetuning: FinetuningConfig
    generating: GeneratingConfig
    adapter: Any
    """The `config` of the finetuning type, e.g. `LoraConfig`."""
    given: Mapping[str, Any]
    """The keys that the user wrote, decoded."""
    changed: frozenset[str] = frozenset()
    """Those of them whose value is not the default."""
    warnings: tuple[Problem, ...] = ()
    """Keys without effect, or not read; the command prints them once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRun(Run):
    """A run of `luthier train`."""

    training: TrainingKeys
    method: Any
    """The `config` of the stage, e.g. `SftConfig`."""
    optimizers: Mapping[str, Any]
    """Name -> `config` of each optimizer of luthier that is switched on: one at most, else `optim` decides."""
    profiler: ProfilerConfig
    fp8: Fp8Config
    swanlab: SwanlabConfig
    recovery: RecoveryConfig
    parallel: ParallelConfig
    mcore: McoreConfig
    bridge: BridgeConfig
    ray: RayConfig
    kt: KTransformersConfig
    tasks: EvalTasksConfig

    @property
    def trains(self) -> bool:
        """Whether the run trains: do_train is set, or none of the three do_ keys is."""
        return self.training["do_train"] or not (self.training["do_eval"] or self.training["do_predict"])

    @property
    def shuffles(self) -> bool:
        """Whether training reads the rows in another order than that of the dataset."""
        return not self.finetuning.disable_shuffling and self.training["train_sampling_strategy"] != "sequential"


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRun(Run):
    """A run that generates text, e.g. `luthier chat`."""

    vllm: VllmConfig
    sglang: SglangConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRun(Run):
    """A run of `luthier export`."""

    export: ExportConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRun(TrainRun):
    """A run of `luthier eval`. It has the keys of a training run too, since rows are read as training reads them."""

    evaluation: EvalConfig

    @property
    def trains(self) -> bool:
        return False
