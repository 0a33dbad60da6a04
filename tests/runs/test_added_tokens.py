"""Tokens added in training come back with the adapter: chat and export need not be told again."""

import luthier
from luthier.config.load import load_infer
from luthier.workflow.text import load_text_side
from tests.small_world import small_world


def test_the_tokenizer_of_an_adapter_takes_precedence_over_that_of_the_model(tmp_path):
    world = small_world(tmp_path)
    trained = {
        **world,
        "finetuning_type": "lora",
        "add_special_tokens": "<one>,<two>",
        "resize_vocab": True,
        "max_steps": 1,
    }
    luthier.train(trained)
    keys = {
        "model_name_or_path": world["model_name_or_path"],
        "adapter_name_or_path": world["output_dir"],
        "template": "chatml",
        "finetuning_type": "lora",
    }
    tokenizer = load_text_side(load_infer(keys)).tokenizer
    assert len(tokenizer.encode("<one><two>", add_special_tokens=False)) == 2
    session = luthier.chat({**keys, "max_new_tokens": 2, "do_sample": False})
    assert session.ask("hi") is not None
    folder = luthier.export({**keys, "export_dir": str(tmp_path / "merged")})
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged, its_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert merged.get_input_embeddings().weight.shape[0] >= len(its_tokenizer) == len(tokenizer)
