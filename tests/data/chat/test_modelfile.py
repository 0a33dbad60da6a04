"""Ollama's Modelfile, made of a format."""

from luthier.data.chat.modelfile import modelfile
from luthier.data.templates import get_template

LLAMA3_MODELFILE = '''\
# Made by luthier.

FROM .

TEMPLATE """<|begin_of_text|>{{ if .System }}<|start_header_id|>system<|end_header_id|>

{{ .System }}<|eot_id|>{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}<|start_header_id|>user<|end_header_id|>

{{ .Content }}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{{ else if eq .Role "assistant" }}{{ .Content }}<|eot_id|>{{ end }}{{ end }}"""

PARAMETER stop "<|eot_id|>"
PARAMETER stop "<|eom_id|>"
PARAMETER num_ctx 4096
'''


def test_modelfile():
    made = modelfile(get_template("llama3"), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    assert made == LLAMA3_MODELFILE


def test_modelfile_with_system_in_the_first_turn():
    text = modelfile(get_template("gemma"), bos_token="<bos>", eos_token="<end_of_turn>")
    assert "<start_of_turn>user\n{{ if and $first $.System }}{{ $.System }}\n\n{{ end }}{{ $first = false }}" in text
    assert 'SYSTEM """You are a helpful assistant."""' in modelfile(
        get_template("qwen2_vl"), bos_token=None, eos_token="<|im_end|>"
    )
