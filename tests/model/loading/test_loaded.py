"""What is checked and recorded once weights are in place."""

from transformers import AutoModelForCausalLM

from luthier.model.loading.loaded import resolved_settings


def test_the_manifest_gets_what_open_choices_became(llama_folder):
    model = AutoModelForCausalLM.from_pretrained(llama_folder, attn_implementation="sdpa")
    assert resolved_settings(model) == {"attention": "sdpa", "dtype": "float32"}
    model.config.rope_parameters["rope_type"] = "yarn"
    assert resolved_settings(model)["rope"] == "yarn"
