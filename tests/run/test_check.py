"""`luthier check RUN`: all problems at once, of the keys and of what they point to."""

import json

import pytest

from luthier import cli
from tests.working_folder import write


def test_check_of_a_good_file(folder, capsys):
    assert cli.main(["check", write(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("run.yaml: 6 keys fine (stage sft, lora)\n") and captured.err == ""


def test_check_prints_warnings_on_stdout(folder, capsys):
    assert cli.main(["check", write(folder, pref_beta=0.1)]) == 0
    captured = capsys.readouterr()
    assert "warning: " in captured.out and "stage: dpo" in captured.out and "7 keys fine, 1 warning" in captured.out


def test_check_prints_all_problems_on_stderr(folder, capsys):
    assert cli.main(["check", write(folder, lora_rnk=8, lora_alpha="much")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "2 problems" in captured.err and "did you mean lora_rank" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"template": "qwne"},
            "run.yaml:1: template: 'qwne': no chat format has this name -> did you mean qwen or qwen3?",
        ),
        ({"dataset": "dd"}, "dd"),
        ({"dataset_dir": "nowhere"}, "nowhere"),
    ],
)
def test_check_looks_at_what_the_keys_point_to(folder, capsys, keys, message):
    assert cli.main(["check", write(folder, **keys)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "asks"),
    [
        ({"use_unsloth": True}, "unsloth.is_installed"),
        ({"enable_liger_kernel": True}, "model.features.liger.is_installed"),
        ({"use_kt": True}, "ktransformers.missing_packages"),
        ({"optim": "paged_adamw_8bit"}, "optim.is_installed"),
    ],
)
def test_a_library_may_be_on_another_machine(folder, capsys, monkeypatch, keys, asks):
    """So check warns of one that is missing, and the run itself does not start."""
    place = f"luthier.{asks}" if asks.startswith("model") else f"luthier.config.rules.{asks}"
    monkeypatch.setattr(place, lambda *name: "kt-kernel" if "packages" in asks else False)
    run = write(folder, **keys)
    assert cli.main(["check", run]) == 0
    captured = capsys.readouterr()
    assert " installed" in captured.out and f"{next(iter(keys))}: " in captured.out and captured.err == ""
    assert cli.main(["train", run]) == 2
    assert f"{next(iter(keys))}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("there", "remedy"),
    [((), "correct the path, or leave it out"), ((4, 12), "choose one of checkpoint-4, checkpoint-12")],
)
def test_a_checkpoint_may_be_on_another_machine(folder, capsys, there, remedy):
    """So check warns of one that is missing, and the run itself does not start."""
    for step in there:
        (folder / "out" / f"checkpoint-{step}").mkdir(parents=True)
    run = write(folder, resume_from_checkpoint="out/checkpoint-8")
    assert cli.main(["check", run]) == 0
    captured = capsys.readouterr()
    told = f"resume_from_checkpoint: 'out/checkpoint-8': there is no such folder -> {remedy}"
    assert told in captured.out and captured.err == ""
    assert cli.main(["train", run]) == 2
    assert told in capsys.readouterr().err and not (folder / "o").exists()


def test_the_word_of_v1_for_the_last_checkpoint(folder, capsys):
    assert cli.main(["train", write(folder, resume_from_checkpoint="auto")]) == 2
    assert "leave it out: the last checkpoint in output_dir is resumed from anyway" in capsys.readouterr().err


def test_a_file_of_new_tokens_may_be_on_another_machine(folder, capsys):
    run = write(folder, new_special_tokens_config="tokens.yaml", resize_vocab=True)
    assert cli.main(["check", run]) == 0
    assert "new_special_tokens_config: 'tokens.yaml': there is no file tokens.yaml" in capsys.readouterr().out
    assert cli.main(["train", run]) == 2
    assert "there is no file tokens.yaml" in capsys.readouterr().err
    (folder / "tokens.yaml").write_text("<a>: begins a thought", encoding="utf-8")
    assert cli.main(["check", run]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"model_name_or_path": "m", "export_dir": "e"}, "export"),
        ({"model_name_or_path": "m", "template": "qwen"}, "infer"),
        ({"model_name_or_path": "m", "adapter_name_or_path": "a", "stage": "sft"}, "infer"),
    ],
)
def test_check_works_out_what_kind_of_file_it_is(folder, capsys, keys, kind):
    (folder / "other.json").write_text(json.dumps(keys), encoding="utf-8")
    assert cli.main(["check", "other.json"]) == 0
    assert capsys.readouterr().out.endswith(f"({kind})\n")


def test_check_may_be_told_the_kind(folder, capsys):
    (folder / "chat.yaml").write_text("model_name_or_path: m\n", encoding="utf-8")
    assert cli.main(["check", "chat.yaml", "--for", "train"]) == 2
    assert "nothing to do" in capsys.readouterr().err
    assert cli.main(["check", "--for=chat", "chat.yaml", "template=qwen"]) == 0
    assert cli.main(["check", "chat.yaml", "--for", "cooking"]) == 2
    assert cli.main(["check"]) == 2
