"""The models that a run asks beside the one that learns: loaded, laid out, and given to the trainer."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.config.runs import TrainRun

if TYPE_CHECKING:
    from torch import nn

    from luthier.stages import Stage
    from luthier.training.trainer import StageTrainer
    from luthier.workflow.text import TextSide

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


def load_wanted(run: TrainRun, stage: "Stage", text: "TextSide") -> "dict[str, nn.Module]":
    """Name -> model, for every network that the loss asks and that is a model of its own."""
    from luthier.model.loading.frozen import load_other

    return {
        wanted.name: load_other(run, wanted.key, wanted.source, wanted.adapters, text.fitted, bits=wanted.bits)
        for wanted in stage.wants(run)
        if wanted.source is not None
    }


def isolate_all(models: "Mapping[str, nn.Module]") -> str | None:
    """None if all of them keep apart rows that lie behind one another, else why rows must be padded."""
    from luthier.model.attention import isolate_samples, isolates_samples

    for name, model in models.items():
        reason = isolates_samples(model)
        if reason is not None:
            return f"of the {name}: {reason}"
        isolate_samples(model)
    return None


def add_companions(run: TrainRun, trainer: "StageTrainer", loaded: "Mapping[str, nn.Module]") -> None:
    """Gives the trainer what its stage wants; the policy as it is now stands in where no model is named."""
    from luthier.model.frozen_models import Companion, OtherModel, PolicyAtStart
    from luthier.model.heads.output_head import inspect_head

    device = trainer.args.device
    others = {name: model.to(device) for name, model in loaded.items()}
    companions: dict[str, Companion] = {name: OtherModel(model, inspect_head(model)) for name, model in others.items()}
    for wanted in trainer.stage.wants(run):
        if wanted.source is None:
            companions[wanted.name] = PolicyAtStart.of(trainer.policy, trainer.head)
    trainer.companions = companions


def add_reference_of(run: TrainRun, trainer: "StageTrainer", text: "TextSide") -> None:
    """What the reference model finds of every row, before the first step changes the model that may be it."""
    from luthier.data.prepare import cache_of
    from luthier.model.loading.frozen import load_other
    from luthier.training.fit import collator
    from luthier.training.reference_logps import Judge, add_reference

    method = run.method
    if method.ref_model is None:
        judge = Judge(trainer.policy, trainer.collate)
    else:
        bits = method.ref_model_quantization_bit
        model = load_other(run, "ref_model", method.ref_model, method.ref_model_adapters, text.fitted, bits=bits)
        concatenates = isolate_all({"reference": model}) is None
        judge = Judge(model, collator(text.tokenizer.pad_token_id, concatenates))
    add_reference(trainer, judge, cache_of(run.data))
