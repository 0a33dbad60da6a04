"""The rollouts of a run: prompts, generation of answers, and rewards."""

from typing import TYPE_CHECKING, Any

from luthier.core.errors import RowError
from luthier.core.log import info
from luthier.data.collate import concatenate_rows
from luthier.data.pixels import Prompts
from luthier.data.rows.encoding import encode_last_turns
from luthier.data.types import Dialogue, Message
from luthier.infer.batch import generate_answers
from luthier.infer.types import Settings
from luthier.model.adapters._series import adapters_of_reward_model
from luthier.model.attention import isolate_samples, isolates_samples
from luthier.model.fitting import FittingBatch
from luthier.model.loading.frozen import load_frozen_model
from luthier.model.sharded import whole_weights
from luthier.training.parts import collator
from luthier.training.rewards import Reward, WeightedRewards
from luthier.training.rewards.functions import load_function
from luthier.training.rewards.reward_model import RewardModel
from luthier.training.rewards.server import RewardServer
from luthier.training.rollouts import Rollouts
from luthier.workflow.seeing import pixels_for, require_same_eyes, trial_of
from luthier.workflow.served_rollouts import serve_rollouts

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

    from luthier.config.runs import TrainRun
    from luthier.data.pixels import Pixels
    from luthier.data.prepare import PreparedData
    from luthier.model.types import Models
    from luthier.stages._rollout import Rollout
    from luthier.training.distributed.sums import Collate
    from luthier.workflow.text import TextSide


def make_rollouts(
    run: "TrainRun",
    plan: "Rollout",
    models: "Models",
    args: "TrainingArguments",
    collate: "Collate",
    data: "PreparedData",
    text: "TextSide",
    pixels: "Pixels | None" = None,
) -> "Rollouts":
    """`plan`: from the stage. The prompts are the training rows. `pixels`: for rows with media."""

    settings, stop_ids = Settings.of(run.generating), frozenset(text.fitted.stop_token_ids)

    is_served = plan.advantages is not None and run.method.rollout_backend == "vllm"
    served = serve_rollouts(run, text, models.policy, args, settings, stop_ids) if is_served else None

    batch = FittingBatch("answers generated")

    def generate(model: Any, rows: Any, seeds: Any) -> list[list[int]]:
        def some(numbers: Any, num_together: int) -> Any:
            asked = [rows[number] for number in numbers]
            options: dict[str, Any] = {
                "keeps_stop": True,
                "seeds": [seeds[number] for number in numbers],
                "fast_path": run.model.fast_path,
            }
            if pixels is not None:
                options["seen"] = Prompts(pixels, asked)
            prompts = [row["input_ids"] for row in asked]
            return generate_answers(model, text.tokenizer, prompts, settings, stop_ids, num_together, **options)

        with whole_weights(model):
            return batch.results(some, len(rows), len(rows))

    def decode(ids: Any, with_special: bool) -> str:
        return str(text.tokenizer.decode(ids, skip_special_tokens=not with_special))

    assert data.table is not None, "the rules require a dataset"
    return Rollouts(
        plan=plan,
        config=run.method,
        models=models,
        args=args,
        collate=collate,
        prompts=data.table,
        generate=served or generate,
        decode=decode,
        rewards=None if plan.advantages is None else load_rewards(run, text, args, models.policy),
        stop_ids=stop_ids,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens if settings.max_new_tokens > 0 else settings.max_length,
        shuffles=run.shuffles,
    )


def load_rewards(
    run: "TrainRun", text: "TextSide", args: "TrainingArguments", policy: "nn.Module"
) -> "WeightedRewards":
    """First the reward functions, then the reward model, each with its weight."""

    method = run.method
    rewards: list[Reward] = [load_function(name) for name in method.reward_funcs]
    if method.reward_model is not None:
        is_server = method.reward_model_type == "api"
        rewards.append(RewardServer(method.reward_model) if is_server else load_reward_model(run, text, args, policy))
    return WeightedRewards(rewards, method.reward_weights or [1.0] * len(rewards))


def load_reward_model(
    run: "TrainRun", text: "TextSide", args: "TrainingArguments", policy: "nn.Module"
) -> "RewardModel":
    """The model `reward_model`, or the run's base model with the adapter `reward_model`."""

    method = run.method
    is_adapter = method.reward_model_type == "lora"
    source = run.model.model_name_or_path if is_adapter else method.reward_model
    adapters = (method.reward_model,) if is_adapter else method.reward_model_adapters
    bits = method.reward_model_quantization_bit
    line = adapters_of_reward_model(source) if is_adapter else None
    model = load_frozen_model(run, "reward_model", source, adapters, text.fitted, line=line, bits=bits, scores=True)
    require_same_eyes("reward_model", model, policy, text)
    model = model.to(args.device)  # type: ignore[arg-type]
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    info(f"reward_model: {method.reward_model}: loaded next to the policy, {size / 1e9:.2f} GB")
    concatenated = concatenate_rows if isolates_samples(model, trial_of(text)) is None else None
    if concatenated is not None:
        isolate_samples(model)
    collate = collator(text.tokenizer.pad_token_id, concatenated, pixels_for(model, text))
    return RewardModel(method.reward_model, model, closing_ids(text), collate, args.eval_batch_size)


def closing_ids(text: "TextSide") -> tuple[int, ...]:
    """Token ids that the chat format writes after the stop token of an answer, e.g. a line break."""

    dialogue = Dialogue((Message("user", "a"), Message("assistant", "a")))
    try:
        (turn,) = encode_last_turns([dialogue], text.encoding.unlimited())
    except RowError:
        return ()
    answer = turn.labels
    stops = set(text.fitted.stop_token_ids)
    ends = [index for index, token in enumerate(answer) if token in stops]
    return tuple(answer[ends[-1] + 1 :]) if ends else ()
