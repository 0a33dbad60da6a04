"""The registries of luthier, one line each. To add a variant, add a file to the folder named here."""

from luthier.core.registry import Registry

STAGES = Registry("stage", "luthier.stages", "STAGE")
ADAPTERS = Registry("finetuning_type", "luthier.model.adapters", "ADAPTER")
QUANTIZERS = Registry("quantization_method", "luthier.model.quantization", "QUANTIZER")
FEATURES = Registry("feature", "luthier.model.features", "FEATURE")
BACKENDS = Registry("backend", "luthier.model.backends", "BACKEND")
FORMATS = Registry("formatting", "luthier.data.formats", "FORMAT")
CHECKS = Registry("check", "luthier.inspection.doctor", "CHECK")
TOOL_SYNTAXES = Registry("tool_format", "luthier.data.tools", "SYNTAX")
OPTIMIZERS = Registry("optimizer", "luthier.training.optimizers", "OPTIMIZER")
EVAL_KINDS = Registry("task", "luthier.evals.tasks", "KIND")
MEDIA_KINDS = Registry("kind of media", "luthier.data.media.kinds", "KIND")
ENGINES = Registry("infer_backend", "luthier.infer.engines", "ENGINE")
