"""The same work by hand with transformers.Trainer and peft, configured like the defaults of LLaMA-Factory 0.9.5.

Gradient checkpointing (reentrant) is on, trainable parameters are in float32, rows are padded to the longest of the
batch and to multiples of 8, logits exist for the whole vocabulary at every position, and the reference model of dpo and
kto runs at each step (the policy without its adapter). `settings` of the work: `checkpointing`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import logsigmoid
from transformers import Trainer

from benchmarks.goals.clock import watch_trainer

if TYPE_CHECKING:
    from benchmarks.goals.child import Work
    from benchmarks.goals.clock import Clock

IGNORED = -100
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BETA = 0.1
PAD_MULTIPLE = 8

Batch = dict[str, Any]


def run(work: "Work", clock: "Clock") -> None:
    watch_trainer(clock)
    train(work.keys, work.token_rows(), checkpointing=work.setting("checkpointing", True))


def train(keys: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, checkpointing: bool) -> Trainer:
    """Train as the keys of the run file say, as far as the measures need them."""
    from transformers import TrainingArguments

    stage = keys["stage"]
    model = policy(keys)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        model.config.use_cache = False
    pad_token_id = model.config.pad_token_id or 0
    if stage == "rm":
        model = Scorer(model)
    arguments = TrainingArguments(
        keys["output_dir"],
        per_device_train_batch_size=keys["per_device_train_batch_size"],
        max_steps=keys["max_steps"],
        learning_rate=keys["learning_rate"],
        bf16=bool(keys.get("bf16")),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
    )
    kind = {"dpo": DpoTrainer, "kto": KtoTrainer, "rm": RmTrainer, "gkd": GkdTrainer}.get(stage, Trainer)
    trainer: Any = kind(
        model,
        arguments,
        data_collator=lambda batch: collate(batch, pad_token_id),
        train_dataset=list(rows),
    )
    if stage == "gkd":
        trainer.teacher = frozen(keys["teacher_model"]).to(arguments.device)
    trainer.train()
    return trainer


def policy(keys: Mapping[str, Any]) -> Any:
    """The model to train, with its adapter unless it is trained in full."""
    from peft import LoraConfig, get_peft_model

    model = load(keys["model_name_or_path"], torch.bfloat16 if keys.get("bf16") else torch.float32, keys)
    if keys["finetuning_type"] == "full":
        return model.float()
    torch.manual_seed(42)  # the seed of luthier and of LLaMA-Factory, so that adapters begin alike
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS), task_type="CAUSAL_LM"))


def load(source: str, dtype: torch.dtype, keys: Mapping[str, Any]) -> Any:
    """A folder or a GGUF file; in 4 bits if the keys say so."""
    from transformers import AutoModelForCausalLM

    folder, _, file = source.rpartition("/")
    if file.endswith(".gguf"):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype)
        # transformers refuses to train what it loaded from GGUF until the quantizer is taken off.
        del model.hf_quantizer
        model.is_quantized = False
        return model
    if not keys.get("quantization_bit"):
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    if keys.get("quantization_method", "bnb") == "hqq":
        return in_hqq(AutoModelForCausalLM.from_pretrained(source, dtype=dtype), dtype)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config)


def in_hqq(model: Any, dtype: torch.dtype) -> Any:
    """Its layers as those of the hqq library. transformers 5 no longer does this itself."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, torch.nn.Linear):
                    config = BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
                    setattr(parent, name, HQQLinear(layer, config, compute_dtype=dtype, device=device))
    return model


def frozen(source: str) -> Any:
    return load(source, torch.float32, {}).eval().requires_grad_(False)


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> Batch:
    """A padded rectangle: the first parts of all rows, then their second parts (`chosen_`, `rejected_`, `kl_`)."""
    prefixes = [name.removesuffix("input_ids") for name in rows[0] if name.endswith("input_ids")]
    parts = [(row[f"{prefix}input_ids"], row[f"{prefix}labels"]) for prefix in prefixes for row in rows]
    width = -(-max(len(ids) for ids, _ in parts) // PAD_MULTIPLE) * PAD_MULTIPLE

    def rectangle(lists: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*values, *[filler] * (width - len(values))] for values in lists])

    batch: Batch = {
        "input_ids": rectangle([ids for ids, _ in parts], pad_token_id),
        "attention_mask": rectangle([[1] * len(ids) for ids, _ in parts], 0),
        "labels": rectangle([labels for _, labels in parts], IGNORED),
    }
    if "kto_tags" in rows[0]:
        batch["kto_tags"] = torch.tensor([row["kto_tags"] for row in rows])
    return batch


def forward(model: Any, batch: Batch) -> torch.Tensor:
    """(B, T, V) float32."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits.float()


def answer_logps(model: Any, batch: Batch) -> torch.Tensor:
    """(B,) the log-probability of each answer."""
    labels = batch["labels"][:, 1:]
    logps = forward(model, batch)[:, :-1].log_softmax(-1)
    found = logps.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (found * (labels != IGNORED)).sum(1)


def without_adapter(model: Any, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    with torch.no_grad(), model.disable_adapter():
        return compute()


class DpoTrainer(Trainer):
    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ratios = answer_logps(model, inputs)
        ratios = ratios - without_adapter(model, lambda: answer_logps(model, inputs))
        chosen, rejected = ratios.chunk(2)
        return -logsigmoid(BETA * (chosen - rejected)).mean()


class KtoTrainer(Trainer):
    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        liked = inputs["kto_tags"] > 0
        halves = [{name: inputs[name].chunk(2)[part] for name in inputs if name != "kto_tags"} for part in (0, 1)]
        answers, mismatched = halves
        ratios = answer_logps(model, answers)
        ratios = ratios - without_adapter(model, lambda: answer_logps(model, answers))
        with torch.no_grad():
            kl = answer_logps(model, mismatched)
        kl = (kl - without_adapter(model, lambda: answer_logps(model, mismatched))).mean().clamp(min=0)
        return (1 - (BETA * torch.where(liked, ratios - kl, kl - ratios)).sigmoid()).mean()


class Scorer(torch.nn.Module):
    """A causal model with a layer that scores: the logits are computed with it, as LLaMA-Factory does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.score = torch.nn.Linear(model.config.hidden_size, 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """(B,) the score after the last token of each row."""
        output = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            output_hidden_states=True,
        )
        last = batch["attention_mask"].sum(1) - 1
        scores = self.score(output.hidden_states[-1].float()).squeeze(-1)
        return scores.gather(1, last.unsqueeze(1)).squeeze(1)


class RmTrainer(Trainer):
    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        chosen, rejected = model(inputs).chunk(2)
        return -logsigmoid(chosen - rejected).mean()


class GkdTrainer(Trainer):
    """Jensen-Shannon divergence at every labeled token, both distributions over the whole vocabulary."""

    teacher: Any = None

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        own = forward(model, inputs)[:, :-1].log_softmax(-1)
        with torch.no_grad():
            teacher = forward(self.teacher, inputs)[:, :-1].log_softmax(-1)
        mixture = torch.logaddexp(own, teacher) - torch.log(torch.tensor(2.0))
        from_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
        from_own = (own.exp() * (own - mixture)).sum(-1)
        labeled = inputs["labels"][:, 1:] != IGNORED
        return ((from_teacher + from_own) / 2)[labeled].mean()
