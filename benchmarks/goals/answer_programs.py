"""Programs that answer one prompt in each turn: `generate()` of transformers, and the engine of luthier.

Each has a process of its own, as it has for its users. In one process they would share the threads of OpenMP, which
then sleep between two operations and begin each of them late.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.goals.child import Work
    from benchmarks.goals.clock import Clock


def run_reference(work: "Work", clock: "Clock") -> None:
    import torch
    from transformers import GenerationConfig

    from luthier.model.loading.load import load_model

    source, dtype, num_tokens = _source(work), getattr(torch, work.setting("dtype")), work.setting("answer")
    model: Any = load_model(source, dtype=dtype).eval()
    config = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens, pad_token_id=0)
    given = torch.tensor([_prompt(work, model.config.vocab_size)])
    for _ in range(work.setting("turns")):
        clock.begin()
        model.generate(given, attention_mask=torch.ones_like(given), generation_config=config)
        clock.end()


def run_luthier(work: "Work", clock: "Clock") -> None:
    import torch

    from luthier.core.threads import in_own_thread
    from luthier.infer.engines.huggingface import HuggingFaceModel
    from luthier.infer.types import Settings
    from luthier.model.loading.load import load_model
    from luthier.model.tokenizer import load_tokenizer

    source, dtype = _source(work), getattr(torch, work.setting("dtype"))
    tokenizer = load_tokenizer(source)

    def opened() -> HuggingFaceModel:  # as `luthier chat` does
        return HuggingFaceModel(load_model(source, dtype=dtype).eval(), tokenizer, [], max_rows=1)

    engine = in_own_thread(opened)
    settings = Settings(do_sample=False, max_new_tokens=work.setting("answer"), ignore_eos=True)
    prompt = _prompt(work, engine.model.config.vocab_size)
    for _ in range(work.setting("turns")):
        clock.begin()
        engine.generate(prompt, settings)
        clock.end()
    engine.close()


def _source(work: "Work") -> Any:
    from luthier.core.log import silence_libraries
    from luthier.model.files.sources import ModelSource

    silence_libraries()
    return ModelSource(work.keys["model_name_or_path"])


def _prompt(work: "Work", vocab_size: int) -> list[int]:
    from benchmarks.bench_generate import prompts

    (prompt,) = prompts(1, work.setting("prompt"), vocab_size)
    return prompt
