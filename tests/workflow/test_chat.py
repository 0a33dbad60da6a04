"""Chats with a tiny model: from Python, through the command, and with whatever chat format the model brings along."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import luthier
from luthier.cli import main
from luthier.core.errors import InvalidInput, ModelError
from luthier.infer.prompting import ModelTemplatePrompting
from luthier.infer.types import Settings
from tests.tiny import byte_tokenizer, tiny_llama
from tests.workflow.test_export import adapter

GREEDY = {"do_sample": False, "max_new_tokens": 12}


def chat(folder: Path, **keys):
    return luthier.chat({"model_name_or_path": str(folder), "template": "chatml", **GREEDY, **keys})


def command(*words: str, **how) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "luthier", "chat", *words], text=True, **pipes, **how)


def template_from_slots(tmp_path: Path, template: str) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tiny_llama(tmp_path / "model", tokenizer=tokenizer)


def test_a_session_answers_streams_and_forgets(llama_folder):
    session = chat(llama_folder)
    first = session.ask("Hi")
    assert first
    assert session.ask("Hi") != first  # the history is part of the prompt
    session.clear()
    assert "".join(session.stream("Hi")) == first


def test_settings_can_be_changed_for_one_answer(llama_folder):
    session = chat(llama_folder)
    long = session.ask("Hi")
    session.clear()
    assert len(session.ask("Hi", Settings(do_sample=False, max_new_tokens=2))) < len(long)


def test_the_adapter_speaks(llama_folder, tmp_path):
    lora = adapter(llama_folder, tmp_path / "lora")
    with_adapter = chat(llama_folder, adapter_name_or_path=str(lora), finetuning_type="lora")
    merged = luthier.export(
        {
            "model_name_or_path": str(llama_folder),
            "adapter_name_or_path": str(lora),
            "template": "chatml",
            "export_dir": str(tmp_path / "merged"),
        }
    )
    answer = with_adapter.ask("Hi")
    assert answer == chat(merged).ask("Hi")
    assert answer != chat(llama_folder).ask("Hi")


def test_without_kv_cache_the_answer_is_the_same(llama_folder):
    assert chat(llama_folder, use_kv_cache=False).ask("Hi") == chat(llama_folder).ask("Hi")


def test_no_template_runs_the_models_own(tmp_path):
    folder = template_from_slots(
        tmp_path,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    session = chat(folder, template=None)
    assert isinstance(session.conversation.prompting, ModelTemplatePrompting)
    assert 258 in session.model.stop_ids  # <|im_end|>, though the tokenizer's end token is another
    assert session.ask("Hi") == chat(folder).ask("Hi")


def test_no_template_runs_the_models_own_even_where_it_is_more_than_slots(tmp_path):
    folder = template_from_slots(
        tmp_path,
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{{ loop.length }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}",
    )
    session = chat(folder, template=None)
    assert isinstance(session.conversation.prompting, ModelTemplatePrompting)
    assert {258, 260} <= session.model.stop_ids
    prompt = session.conversation.ask("Hi")
    assert session.model.tokenizer.decode(prompt) == "USER: Hi1<|im_end|>ASSISTANT: "


def test_what_generation_config_calls_an_end_is_one(llama_folder, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(llama_folder, tmp_path / "model")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [260, 300]}))
    assert {260, 300} <= chat(folder).model.stop_ids


def test_added_tokens_find_room_in_the_embedding(llama_folder):
    session = chat(llama_folder, add_special_tokens=",".join(f"<extra_{i}>" for i in range(80)))
    assert len(session.model.tokenizer) > 320
    session.ask("<extra_79>")  # its id lies beyond the rows of the saved embedding
    assert len(session.conversation.history) == 2


def test_a_conversation_that_fills_the_model_is_one_error(llama_folder):
    session = chat(llama_folder)
    with pytest.raises(InvalidInput, match="no room for an answer: the prompt has"):
        session.ask("x" * 600)
    assert session.conversation.history == ()
    assert session.ask("Hi")


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
def test_an_engine_that_is_not_installed_is_one_sentence_before_torch(llama_folder, backend):
    keys = [f"model_name_or_path={llama_folder}", "template=chatml", f"infer_backend={backend}"]
    code = f"import sys\nfrom luthier.cli import main\nprint(main(['chat', *{keys}]), 'torch' in sys.modules)"
    environment = {**os.environ, "PATH": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "2 False\n"
    assert (
        f"infer_backend: '{backend}': there is no program {backend} here -> pip install {backend} (here, or"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_reward_model_does_not_chat(llama_folder):
    with pytest.raises(InvalidInput, match="stage: rm: a reward model scores texts and does not answer"):
        chat(llama_folder, stage="rm")


def test_a_missing_model_is_one_error(tmp_path):
    with pytest.raises(ModelError):
        chat(tmp_path / "absent")


def test_once_prints_the_answer_alone(llama_folder, tmp_path, capfd):
    file = tmp_path / "my chat.yaml"
    file.write_text(f"model_name_or_path: {llama_folder}\ntemplate: chatml\ndo_sample: false\n")
    answer = chat(llama_folder).ask("Hi")
    capfd.readouterr()
    assert main(["chat", str(file), "max_new_tokens=12", "--once", "Hi"]) == 0
    assert capfd.readouterr().out == answer + "\n"


@pytest.mark.thorough
def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(tmp_path):
    folder = tiny_llama(tmp_path / "model", max_position_embeddings=8192)
    words = ("--model_name_or_path", str(folder), "--template", "chatml", "--do_sample", "false")
    process = command(*words, "--max_new_tokens", "8000")
    process.stdin.write("Hi\n")
    process.stdin.flush()
    begin = process.stdout.read(len("\nUser: Hi\nAssistant: ") + 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate("exit\n", timeout=300)
    assert begin.startswith("\nUser: Hi\nAssistant: ")
    assert "(stopped)" in err
    assert out.endswith("\nUser: exit\n")
    assert process.returncode == 0
