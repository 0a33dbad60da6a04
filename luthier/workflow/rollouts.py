"""Learning from the model's own answers, put together: prompts, how answers are written, who scores them."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RowError
from luthier.core.log import info

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.data.prepare import PreparedData
    from luthier.training.scorers import ModelScorer, WeightedScorers
    from luthier.training.trainer import StageTrainer
    from luthier.workflow.text import TextSide


def add_rollouts(run: "TrainRun", trainer: "StageTrainer", data: "PreparedData", text: "TextSide") -> None:
    """Make `trainer` learn from its own answers to the prompts of `data`, where its stage does."""
    from luthier.infer.batch import generate_answers
    from luthier.infer.types import Settings
    from luthier.model.heads.value_head import add_value_head
    from luthier.training.rollouts import Rollouts, StepRows, numbers_or_batch

    plan = trainer.stage.rollout(run.method)
    if plan is None or not run.trains:
        return
    settings, stop_ids = Settings.of(run.generating), frozenset(text.fitted.stop_token_ids)

    def generate(model: Any, prompts: Any, seeds: Any) -> list[list[int]]:
        options: dict[str, Any] = {"keeps_stop": True, "seeds": seeds}
        return list(generate_answers(model, text.tokenizer, prompts, settings, stop_ids, len(prompts), **options))

    def decode(ids: Any, with_special: bool) -> str:
        return str(text.tokenizer.decode(ids, skip_special_tokens=not with_special))

    if plan.has_values:
        trainer.head = replace(trainer.head, value=add_value_head(trainer.policy))
    assert data.train is not None, "the rules of the run ask for a dataset"
    trainer.rollouts = Rollouts(
        plan=plan,
        prompts=data.train,
        generate=generate,
        decode=decode,
        scorers=None if plan.judge is None else load_scorers(run, text, trainer.args.device),
        stop_ids=stop_ids,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens if settings.max_new_tokens > 0 else settings.max_length,
        seed=run.training["seed"],
        shuffles=trainer.shuffle,
    )
    trainer.train_dataset = StepRows(trainer.rollouts.num_rows_of_epoch(trainer))
    trainer.data_collator = partial(numbers_or_batch, collate=trainer.collate)  # type: ignore[assignment]


def load_scorers(run: "TrainRun", text: "TextSide", device: Any) -> "WeightedScorers":
    """Functions first, then the reward model, each with its weight."""
    from luthier.training.scorers import Scorer, ServerScorer, WeightedScorers, load_function

    method = run.method
    scorers: list[Scorer] = [load_function(name) for name in method.reward_funcs]
    if method.reward_model is not None:
        is_server = method.reward_model_type == "api"
        scorers.append(ServerScorer(method.reward_model) if is_server else load_reward_model(run, text, device))
    return WeightedScorers(scorers, method.reward_weights or [1.0] * len(scorers))


def load_reward_model(run: "TrainRun", text: "TextSide", device: Any) -> "ModelScorer":
    """A model of its own: that of `reward_model`, or the base of the run with `reward_model` as its adapter."""
    from luthier.model.loading.frozen import load_other
    from luthier.training.scorers import ModelScorer

    method = run.method
    is_adapter = method.reward_model_type == "lora"
    source = run.model.model_name_or_path if is_adapter else method.reward_model
    adapters = (method.reward_model,) if is_adapter else method.reward_model_adapters
    bits = method.reward_model_quantization_bit
    model = load_other(run, "reward_model", source, adapters, text.fitted, bits=bits, scores=True).to(device)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    info(f"reward_model: {method.reward_model}: held beside the policy, {size / 1e9:.2f} GB")
    return ModelScorer(method.reward_model, model, closing_ids(text))


def closing_ids(text: "TextSide") -> tuple[int, ...]:
    """What the chat format writes behind the token that ends an answer, e.g. a line break."""
    from luthier.data.rows.encoding import encode_last_turns
    from luthier.data.types import Dialogue, Message

    talk = Dialogue((Message("user", "a"), Message("assistant", "a")))
    try:
        (turn,) = encode_last_turns([talk], text.encoding.unlimited())
    except RowError:
        return ()
    answer = turn.labels
    stops = set(text.fitted.stop_token_ids)
    ends = [place for place, token in enumerate(answer) if token in stops]
    return tuple(answer[ends[-1] + 1 :]) if ends else ()
