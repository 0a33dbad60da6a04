"""`luthier template check`: equal ids are proven, and the first differing token is named with its surroundings."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier import cli
from luthier.config.load import load_train
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.chat.template_slots import template_from_slots
from luthier.data.rows.encoding import Encoding
from luthier.inspection.agreement import compare
from luthier.inspection.sample_dialogues import SAMPLES
from luthier.inspection.server import Server
from luthier.workflow.text import load_text_side
from tests.chat_programs import CHATML, ENDS, PROGRAMS, tokenizer_with
from tests.tiny import byte_tokenizer, tiny_llama


@pytest.fixture
def folder(tmp_path):
    """Writes a folder that holds nothing but a tokenizer with the chat template."""

    def write(chat_template: str | None, **special: Any) -> str:
        tokenizer = byte_tokenizer(**special)
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return write


def checked(capsys, *words: str) -> tuple[int, str, str]:
    status = cli.main(["template", "check", *words])
    out, err = capsys.readouterr()
    return status, out, err


def found(capsys, *words: str) -> tuple[int, dict[str, Any]]:
    status, out, _ = checked(capsys, *words, "--json")
    report = json.loads(out)
    assert report["equal"] == (status == 0)
    return status, report


def of(report: dict[str, Any], name: str) -> dict[str, Any]:
    (conversation,) = [found for found in report["conversations"] if found["name"] == name]
    return conversation


@pytest.mark.parametrize("name", PROGRAMS)
def test_auto_is_equal_for_every_program(name, tmp_path, capsys):
    tokenizer_with(name).save_pretrained(tmp_path)
    status, report = found(capsys, str(tmp_path))
    assert status == 0
    refused = {c["name"] for c in report["conversations"] if c["status"] == "refused"}
    tools = {"tools", "parallel calls", "text beside a call", "thoughts and tools"}
    expected = {
        "gemma": tools | {"system", "multi-turn, system", "thinking on", "thinking off", "empty system"},
        "llama3": {"parallel calls", "text beside a call"},
        "mistral": {"text beside a call"},
        "qwen3": set(),
    }
    assert refused == expected.get(name, tools)
    assert {c["status"] for c in report["conversations"]} <= {"equal", "refused"}
    end = tokenizer_with(name).convert_tokens_to_ids(ENDS.get(name, "</s>"))
    assert end in report["stop_token_ids"]


def test_the_report_in_words(folder, capsys):
    status, out, _ = checked(capsys, folder(CHATML))
    assert status == 0
    assert "multi-turn " in out and "equal (3 answers)" in out
    assert f"all {len(SAMPLES) - 4} conversations are equal" in out
    assert "cannot be served: the model's own chat template does not render tools" in out


def test_another_default_system_text_is_named_as_such(folder, capsys):
    status, report = found(capsys, folder(CHATML), "qwen")
    assert status == 1
    single = of(report, "single")
    assert single["reason"] == "only the default system text differs"
    assert report["default_system"]["server"] == "You are a kind assistant."
    assert report["default_system"]["training"].startswith("You are Qwen")
    assert of(report, "system")["status"] == "equal"
    _, out, _ = checked(capsys, folder(CHATML), "qwen")
    assert "default system text at the server: 'You are a kind assistant.'" in out
    assert "template: auto" in out


def test_the_first_differing_token_is_named_with_its_surroundings(folder, capsys):
    changed = CHATML.replace("{{ message.content }}<|im_end|>", "{{ message.content }} <|im_end|>")
    _, report = found(capsys, folder(changed), "chatml")
    difference = of(report, "system")["difference"]
    assert difference["before"].endswith("Be brief.")
    assert difference["training"].startswith("<|im_end|>\n")
    assert difference["server"].startswith(" <|im_end|>")
    server = "<|im_start|>system\nBe brief."
    assert difference["position"] == len(byte_tokenizer().encode(server))
    assert difference["answer"] == 1
    assert "reason" not in of(report, "system")
    _, out, _ = checked(capsys, folder(changed), "chatml")
    assert f"DIFFERS at token {difference['position']} (answer 1)" in out


def test_thoughts_that_a_format_keeps_and_the_program_drops_are_found(tmp_path, capsys):
    tokenizer_with("qwen3").save_pretrained(tmp_path)
    status, report = found(capsys, str(tmp_path), "qwen3")
    assert status == 1
    assert of(report, "single")["status"] == "equal"
    assert of(report, "thinking on")["difference"]["answer"] == 2


def test_an_end_that_is_no_stop_token_is_found():
    """The program ends answers with an ordinary word. Auto closes such rows with the eos; a row without one is told."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "(end)")
    program, own = ModelChatTemplate(Encoder(tokenizer)), template_from_slots(tokenizer)
    assert own.efficient_eos
    dialogue, stops = SAMPLES[0].dialogue, (tokenizer.eos_token_id,)
    training, server = Encoding(program.encoder, own, None, model_template=program), Server(tokenizer)
    assert compare(training, server, dialogue, stops).status == "equal"
    open_ended = Encoding(program.encoder, replace(own, efficient_eos=False), None, model_template=program)
    finding = compare(open_ended, server, dialogue, stops)
    assert "is missing: nothing there is a token that inference stops at" in finding.reason


def test_what_generation_config_calls_an_end_is_a_stop(folder, capsys):
    model = folder(CHATML)
    Path(model, "generation_config.json").write_text(json.dumps({"eos_token_id": [260, 300]}))
    assert {258, 260, 300} <= set(found(capsys, model)[1]["stop_token_ids"])


@pytest.mark.parametrize(
    ("template", "words", "message"),
    [
        (None, (), "has no chat template of its own"),
        (CHATML, ("smolm2",), "did you mean 'smollm2' or 'smollm'?"),
        (CHATML, ("auto", "--data", "absent.yaml"), "absent.yaml"),
        (CHATML, ("auto", "--rows", "0"), "--rows 0"),
    ],
)
def test_bad_input(folder, capsys, template, words, message):
    status, out, err = checked(capsys, folder(template), *words)
    assert (status, out) == (2, "")
    assert message in err


def test_a_missing_model_is_one_error(tmp_path, capsys):
    status, _, err = checked(capsys, str(tmp_path / "absent"))
    assert status == 2 and "absent" in err


@pytest.fixture
def run_file(tmp_path, folder):
    rows = [{"instruction": f"question {number}", "output": "an answer"} for number in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, {"instruction": 1}]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    file = tmp_path / "run.yaml"
    keys = {"dataset_dir": str(tmp_path), "dataset": "rows", "output_dir": str(tmp_path / "out"), "template": "qwen"}
    model = folder(CHATML)
    file.write_text(json.dumps({"model_name_or_path": model, "stage": "sft", **keys}))
    return model, str(file)


def test_the_rows_of_a_run_are_checked(run_file, capsys):
    model, file = run_file
    status, report = found(capsys, model, "--data", file, "--rows", "3")
    assert status == 1 and report["template"] == "qwen"
    assert len(report["conversations"]) == 3
    assert "rows.json" in report["conversations"][0]["name"]
    status, report = found(capsys, model, "auto", "--data", file)
    assert status == 0 and len(report["conversations"]) == 5


@pytest.mark.parametrize(
    ("template", "words"),
    [("smollm2", "differs from the model's own chat template: only the default system text differs"), ("auto", None)],
)
def test_a_run_with_a_named_format_says_how_it_differs(tmp_path, said, template, words):
    model = tiny_llama(tmp_path / "model", tokenizer=tokenizer_with("chatml"))
    values = {"model_name_or_path": str(model), "template": template, "dataset": "x", "output_dir": str(tmp_path)}
    load_text_side(load_train(values))
    lines = [line for line in said if "differs" in line]
    assert len(lines) == (words is not None)
    if words:
        assert words in lines[0] and "'You are a kind assistant.'" in lines[0]


def test_a_format_that_writes_the_same_is_not_talked_about(tmp_path, said):
    tokenizer = tokenizer_with("chatml")
    tokenizer.chat_template = CHATML[CHATML.index("{% for") :]
    model = tiny_llama(tmp_path / "model", tokenizer=tokenizer)
    values = {"model_name_or_path": str(model), "template": "chatml", "dataset": "x", "output_dir": str(tmp_path)}
    load_text_side(load_train(values))
    assert not [line for line in said if "differs" in line]


def test_no_default_system_text_is_blamed_where_both_have_none(tmp_path, said):
    """The chat template writes empty system marks where no system text is given; the named format writes none."""
    tokenizer = tokenizer_with("chatml")
    tokenizer.chat_template = CHATML.replace("You are a kind assistant.", "")
    model = tiny_llama(tmp_path / "model", tokenizer=tokenizer)
    values = {"model_name_or_path": str(model), "template": "chatml", "dataset": "x", "output_dir": str(tmp_path)}
    load_text_side(load_train(values))
    (line,) = [line for line in said if "differs" in line]
    assert "default system" not in line and "from token " in line and "there 'system" in line


@pytest.mark.thorough
def test_smollm2_differs_from_its_named_format_in_a_full_stop(smollm2_folder, capsys):
    text = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    status, report = found(capsys, str(smollm2_folder), "smollm2")
    assert status == 1
    assert report["default_system"] == {"training": f"{text}.", "server": text}
    difference = of(report, "single")["difference"]
    assert difference["training"].startswith(".<|im_end|>") and difference["server"].startswith("<|im_end|>")
    assert of(report, "system")["status"] == "equal"


@pytest.mark.thorough
def test_smollm2_is_equal_to_itself(smollm2_folder, capsys):
    status, report = found(capsys, str(smollm2_folder))
    assert status == 0
    refused = {c["name"] for c in report["conversations"] if c["status"] != "equal"}
    assert refused == {"tools", "parallel calls", "text beside a call", "thoughts and tools"}
