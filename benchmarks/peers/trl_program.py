"""SFTTrainer and DPOTrainer of trl in their own environment, with their defaults and the token ids that luthier made.

`settings` of the work: `arguments`, more arguments of the trainer's config.
"""

from typing import TYPE_CHECKING, Any

from benchmarks.goals.clock import watch_trainer

if TYPE_CHECKING:
    from benchmarks.goals.child import Work
    from benchmarks.goals.clock import Clock

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100


def run(work: "Work", clock: "Clock") -> None:
    watch_trainer(clock)
    {"sft": sft, "dpo": dpo}[work.keys["stage"]](work)


def arguments(work: "Work") -> dict[str, Any]:
    keys = work.keys
    return {
        "output_dir": keys["output_dir"],
        "per_device_train_batch_size": keys["per_device_train_batch_size"],
        "max_steps": keys["max_steps"],
        "learning_rate": keys["learning_rate"],
        "lr_scheduler_type": "linear",
        "bf16": bool(keys.get("bf16")),
        "max_length": keys["cutoff_len"],
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **work.setting("arguments", {}),
    }


def parts(work: "Work") -> tuple[Any, Any, Any]:
    """(model, tokenizer, adapter config)."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = work.keys["model_name_or_path"]
    dtype = torch.bfloat16 if work.keys.get("bf16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    return model, AutoTokenizer.from_pretrained(source), adapter


def sft(work: "Work") -> None:
    from datasets import Dataset
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": row["input_ids"], "completion_mask": [int(label != IGNORED) for label in row["labels"]]}
        for row in work.token_rows()
    ]
    model, tokenizer, adapter = parts(work)
    config = SFTConfig(**arguments(work), completion_only_loss=True)
    set_seed(42)
    data = Dataset.from_list(rows)
    SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=adapter).train()


def dpo(work: "Work") -> None:
    from datasets import Dataset
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer

    model, tokenizer, adapter = parts(work)
    config = DPOConfig(**arguments(work), beta=0.1)
    set_seed(42)
    data = Dataset.from_list([pair(row, tokenizer) for row in work.token_rows()])
    DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=adapter).train()


def pair(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """Prompt and answers as texts. The trainer adds the end of each answer itself, so it is taken off here."""
    num_prompt = next(index for index, label in enumerate(row["chosen_labels"]) if label != IGNORED)
    texts = {"prompt": tokenizer.decode(row["chosen_input_ids"][:num_prompt])}
    for side in ("chosen", "rejected"):
        answer = row[f"{side}_input_ids"][num_prompt:]
        end = answer.index(tokenizer.eos_token_id)
        texts[side] = tokenizer.decode(answer[:end])
    return texts
