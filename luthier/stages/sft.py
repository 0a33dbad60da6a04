"""Supervised fine-tuning: next-token cross-entropy on the answers of a conversation."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from luthier.config.keys.fields import never_unread
from luthier.config.rules.engine import Rule, Rules, all_of, at_least, is_changed, is_set, not_, warning, within
from luthier.config.rules.parallel import SPLITS
from luthier.data.plans.dialogues import DIALOGUES
from luthier.model.types import Models
from luthier.stages import FrozenModelSpec, LossOutput, Reporting, Stage, StageState
from luthier.stages._anchored import anchored_loss
from luthier.stages._causal import count_targets, next_token_loss
from luthier.stages._reference import REFERENCE_RULES, ReferenceConfig, adapters_of_reference, reference_model
from luthier.stages._token_weights import chosen_weigh

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig(ReferenceConfig):
    train_on_prompt: bool = never_unread(False)
    """Train on the prompt tokens as well as the answers."""
    mask_history: bool = never_unread(False)
    """Train on the last answer of a conversation only."""
    compute_accuracy: bool = False
    """Report next-token accuracy on the evaluation data."""
    label_smoothing_factor: float = 0.0
    """Share of each target that is spread evenly over the vocabulary."""
    use_dft_loss: bool = False
    """Weight the loss of each token by its own probability (https://arxiv.org/abs/2508.05629)."""
    use_eaft_loss: bool = False
    """Weight the loss of each token by the entropy of the prediction, so that confident tokens count less."""
    eaft_alpha: float = 1.0
    """Exponent of the entropy."""
    use_asft_loss: bool = False
    """The DFT loss plus a KL penalty towards a reference: `ref_model`, or the model at the start of training."""
    asft_alpha: float = 0.1
    """Weight of that penalty."""


LOSS_SWITCHES = ("use_dft_loss", "use_eaft_loss", "use_asft_loss")
"""At most one of these replaces the cross-entropy."""

ONE_HISTORY = Rule(
    ("mask_history", "train_on_prompt"),
    "trains on the last answer only, and train_on_prompt trains on every prompt",
    "set one of the two",
    all_of(is_set("method", "train_on_prompt"), is_set("method", "mask_history")),
)

RULES = Rules(
    (
        within("method", "label_smoothing_factor", 0, 1, or_high=False),
        at_least("method", "eaft_alpha", 0),
        at_least("method", "asft_alpha", 0),
        *(
            Rule(
                (first, second),
                f"is one loss, and {second} another",
                "set one of the two",
                all_of(is_set("method", first), is_set("method", second)),
            )
            for first, second in combinations(LOSS_SWITCHES, 2)
        ),
        *(
            warning(
                (key, switch),
                f"is read together with {switch} only",
                f"set {switch}: true, or leave it out",
                all_of(is_changed(key), not_(is_set("method", switch))),
            )
            for key, switch in (
                ("eaft_alpha", "use_eaft_loss"),
                ("asft_alpha", "use_asft_loss"),
                ("ref_model", "use_asft_loss"),
                ("ref_model_adapters", "use_asft_loss"),
            )
        ),
        *REFERENCE_RULES,
        adapters_of_reference(is_set("method", "use_asft_loss")),
        Rule(
            ("label_smoothing_factor", "use_asft_loss"),
            "spreads the target over the vocabulary, which this loss does not support",
            "leave it out",
            all_of(is_set("method", "use_asft_loss"), is_set("method", "label_smoothing_factor")),
        ),
        SPLITS.refuses(
            ("use_asft_loss", "sp_size"),
            "compares with a reference model, which reads whole sequences",
            "leave it out, or leave sp_size out",
            is_set("method", "use_asft_loss"),
        ),
        SPLITS.refuses(
            ("compute_accuracy", "sp_size"),
            "is a mean over rows, of which each process has a part",
            "leave it out, or leave sp_size out",
            is_set("method", "compute_accuracy"),
        ),
        ONE_HISTORY,
        Rule(
            ("compute_accuracy", "predict_with_generate"),
            "measures given answers, and predict_with_generate generates new ones",
            "set one of the two",
            all_of(is_set("method", "compute_accuracy"), is_set("training", "predict_with_generate")),
        ),
        Rule(
            ("do_predict", "predict_with_generate"),
            "writes the answers of the model, which predict_with_generate turns on",
            "set predict_with_generate: true",
            all_of(is_set("training", "do_predict"), not_(is_set("training", "predict_with_generate"))),
        ),
        Rule(
            ("neat_packing", "packing"),
            "packs conversations, while packing: false does not",
            "leave packing out",
            lambda run: run.data.neat_packing and run.data.packing is False,
        ),
    )
)


def loss(
    models: Models, batch: Mapping[str, Any], config: SftConfig, *, state: StageState, training: bool
) -> LossOutput:
    if config.use_asft_loss and training:
        return anchored_loss(models, batch, alpha=config.asft_alpha)
    weigh = chosen_weigh(
        use_dft_loss=config.use_dft_loss, use_eaft_loss=config.use_eaft_loss, eaft_alpha=config.eaft_alpha
    )
    return next_token_loss(
        models,
        batch,
        label_smoothing=config.label_smoothing_factor if training else 0.0,
        weigh=weigh if training else None,
        with_accuracy=config.compute_accuracy and not training,
    )


def frozen_models(run: "TrainRun") -> tuple[FrozenModelSpec, ...]:
    method = run.method
    if not method.use_asft_loss:
        return ()
    return (reference_model(method),)


STAGE = Stage(
    name="sft",
    config=SftConfig,
    rows=DIALOGUES,
    frozen_models=frozen_models,
    reads="cross_entropy",
    units=count_targets,
    loss=loss,
    reporting=Reporting(
        headline=("accuracy",), evaluated=lambda config: ("accuracy",) if config.compute_accuracy else ()
    ),
    check=RULES,
    supports_router_loss=True,
    supports_skipped_tokens=True,
)
