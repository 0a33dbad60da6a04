"""Runs on audio, from dataset_info.json to weights and answers: stages, batches, what is too long, and bad files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

import luthier
from luthier.core.errors import DataError, InvalidInput, ModelError
from luthier.data.collate import concatenate_rows, pad_rows
from luthier.training.parts import collator
from tests.hearing_models import gemma3n_without_weights, talk, tiny_qwen2_audio, tone
from tests.matrix import representatives
from tests.media_models import SAMPLING, SHORT_RUN
from tests.runs.test_images import STAGES, losses

pytest.importorskip("soundfile")
pytest.importorskip("soxr")

NUM_ROWS = 8
ANSWERS = ("up", "down, then up", "silence")


def longest_file_and_letters(completions: list[str], audios: list[list[str]]) -> list[float]:
    """A reward for tests, which gets the paths of the audio of each prompt."""
    sizes = [max((Path(path).stat().st_size for path in paths), default=0) for paths in audios]
    return [size / 1e5 + len(answer) % 5 for answer, size in zip(completions, sizes, strict=True)]


def write(folder: Path) -> dict[str, Any]:
    """A model, sounds and data. Rows have one, two and no sounds, in turn."""
    tiny_qwen2_audio(folder / "model")
    rows = []
    for number in range(NUM_ROWS):
        names = [f"{number}_{n}.{('wav', 'flac')[n]}" for n in range((1, 2, 0)[number % 3])]
        for n, name in enumerate(names):
            tone(folder / name, seconds=0.2 + 0.1 * number, rate=(16_000, 8_000)[n], start=200.0 + 50 * number)
        question = {"role": "user", "content": "<audio>" * len(names) + f"what is {number}?"}
        rows.append({"messages": [question, {"role": "assistant", "content": ANSWERS[number % 3]}], "audios": names})
    pairs = [
        {
            "messages": row["messages"][:1],
            "chosen": row["messages"][1],
            "rejected": {"role": "assistant", "content": "no" + "!" * (number % 4)},
            "audios": row["audios"],
        }
        for number, row in enumerate(rows)
    ]
    feedback = [{**row, "good": bool(number % 2)} for number, row in enumerate(rows)]
    columns = {"messages": "messages", "audios": "audios"}
    shared = {"formatting": "openai", "columns": columns}
    more = {"pairs": {"chosen": "chosen", "rejected": "rejected"}, "feedback": {"kto_tag": "good"}}
    info = {}
    for name, content in (("rows", rows), ("pairs", pairs), ("feedback", feedback)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        own = {"ranking": True} if name == "pairs" else {}
        info[name] = shared | own | {"file_name": f"{name}.json", "columns": columns | more.get(name, {})}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return {
        "model_name_or_path": str(folder / "model"),
        "dataset_dir": str(folder),
        "dataset": "rows",
        **SHORT_RUN,
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "cutoff_len": 512,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        **SAMPLING,
    }


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict[str, Any]:
    return write(tmp_path_factory.mktemp("hear"))


def rows_of(keys: dict[str, Any], *, needs_weights: bool = True, **more: Any):
    """(rows, encoding) of a run's data."""
    from luthier.config.load import load_train
    from luthier.core.kinds import STAGES as KINDS
    from luthier.data.prepare import prepare
    from luthier.workflow.text import load_text_side

    run = load_train({**keys, "output_dir": "unused", **more})
    text = load_text_side(run, needs_weights=needs_weights)
    return prepare(run, KINDS.get(run.stage).rows, text.encoding), text


def as_talk(keys: dict[str, Any], row: dict[str, Any], answer: str) -> list[dict[str, Any]]:
    question = row["messages"][0]["content"].replace("<audio>", "")
    return talk(question, answer, [Path(keys["dataset_dir"]) / name for name in row["audios"]])


def test_ids_are_those_of_the_processor(keys):
    data, text = rows_of(keys)
    processor = text.media.processor
    rows = json.loads((Path(keys["dataset_dir"]) / "rows.json").read_text())
    made_rows = [data.table[number] for number in range(NUM_ROWS)]
    for made, row in zip(made_rows, rows, strict=True):
        messages = as_talk(keys, row, row["messages"][1]["content"])
        own = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
        assert list(made["input_ids"]) == list(own)
        learned = [token for token in made["labels"] if token != -100]
        assert text.tokenizer.decode(learned) == row["messages"][1]["content"] + "<|im_end|>\n"
    account = data.ledger.accounts["rows"]
    assert (account.audios, account.images, account.media_cut) == (9, 0, 0)
    num_tokens = sum(list(made["input_ids"]).count(processor.audio_token_id) for made in made_rows)
    assert account.audio_tokens == num_tokens + 4 * account.audios, "around each stand a colon, a space and two marks"


@pytest.mark.parametrize("layout", [concatenate_rows, lambda rows: pad_rows(rows, 256)], ids=["concatenated", "padded"])
def test_the_loss_of_a_batch_is_that_of_each_row_alone(keys, layout):
    from luthier.model.attention import isolate_samples
    from luthier.model.heads.output_head import inspect_head
    from luthier.model.types import Models
    from luthier.stages._causal import next_token_loss
    from luthier.workflow.seeing import pixels_of

    data, text = rows_of(keys)
    model = AutoModelForMultimodalLM.from_pretrained(keys["model_name_or_path"]).eval()
    for weight in model.parameters():
        weight.data.mul_(2)
    rows = json.loads((Path(keys["dataset_dir"]) / "rows.json").read_text())
    expected = 0.0
    for row in rows:
        expected -= answer_logps(model, text.media.processor, as_talk(keys, row, row["messages"][1]["content"])).item()
    made = [data.table[n] for n in range(len(data.table))]
    batch = collator(
        256, concatenate_rows if layout is concatenate_rows else None, pixels=pixels_of(model, text.media)
    )(made)
    if layout is concatenate_rows:
        isolate_samples(model)
    with torch.no_grad():
        assert next_token_loss(Models(model, inspect_head(model)), batch).total.item() == pytest.approx(
            expected, rel=1e-4
        )


def answer_logps(model: Any, processor: Any, messages: list[dict[str, Any]]) -> torch.Tensor:
    """The log-probability of the answer and its end by transformers alone."""
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    whole = processor.apply_chat_template(messages, **options)
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True, **options)["input_ids"].shape[1]
    logits = model(**whole).logits[0, prompt - 1 : -1].log_softmax(-1)
    return logits.gather(-1, whole["input_ids"][0, prompt:, None]).sum()


@pytest.mark.parametrize("packing", [False, True])
def test_a_model_learns_from_sounds(keys, tmp_path, packing):
    found = losses(luthier.train({**keys, "packing": packing, "neat_packing": packing, "output_dir": str(tmp_path)}))
    assert found[-1] < found[0] - 0.5
    before = load_file(Path(keys["model_name_or_path"]) / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert any("audio_tower" in name and not torch.equal(after[name], before[name]) for name in after)
    assert AutoProcessor.from_pretrained(tmp_path)(text=["hi"])["input_ids"]


@pytest.mark.parametrize("stage", representatives([name for name in STAGES if name != "rm"], "kto", "grpo"))
def test_every_stage_hears(keys, stage, tmp_path):
    given = {**keys, **STAGES[stage], "output_dir": str(tmp_path), "max_steps": 2}
    if given["stage"] == "gkd":
        given["teacher_model"] = given["model_name_or_path"]
    if given["stage"] in ("ppo", "grpo"):
        given["reward_funcs"] = "tests.runs.test_audio:longest_file_and_letters"
    assert len(losses(luthier.train(given))) == 2


def test_a_step_of_dpo_is_that_of_plain_transformers(keys, tmp_path):
    """At the start the log-ratios are 0, so the gradient is -beta / 2 (grad log p(chosen) - grad log p(rejected))."""
    beta, rate, batch = 0.5, 0.1, 4
    more = {"pref_beta": beta, "max_steps": 1, "learning_rate": rate, "optim": "sgd", "max_grad_norm": 0.0}
    steady = {"lr_scheduler_type": "constant", "disable_shuffling": True, "output_dir": str(tmp_path)}
    luthier.train({**keys, **STAGES["dpo"], **more, **steady})
    model = AutoModelForMultimodalLM.from_pretrained(keys["model_name_or_path"])
    processor = AutoProcessor.from_pretrained(keys["model_name_or_path"])
    total = 0.0
    for row in json.loads((Path(keys["dataset_dir"]) / "pairs.json").read_text())[:batch]:
        for part, sign in (("chosen", 1), ("rejected", -1)):
            messages = as_talk(keys, row, row[part]["content"])
            total = total - sign * beta / 2 * answer_logps(model, processor, messages) / batch
    total.backward()
    after = load_file(tmp_path / "model.safetensors")
    for name, weight in model.named_parameters():
        if name in after and weight.grad is not None:
            torch.testing.assert_close(after[name], (weight - rate * weight.grad).detach(), rtol=1e-4, atol=2e-6)


class TestBadFiles:
    """Each is one line with the dataset, the row and the path, and the other rows train."""

    def kept(self, keys, folder: Path, *paths: Any, **more: Any):
        ask = {"role": "user", "content": "<audio>what?"}
        rows = [{"messages": [ask, {"role": "assistant", "content": "up"}], "audios": [path]} for path in paths]
        (folder / "bad.json").write_text(json.dumps(rows))
        columns = {"messages": "messages", "audios": "audios"}
        info = {"bad": {"file_name": "bad.json", "formatting": "openai", "columns": columns}}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        data, _ = rows_of(keys, dataset="bad", dataset_dir=str(folder), media_dir=str(folder), **more)
        return data

    def test_each_is_named_and_the_others_are_kept(self, keys, tmp_path):
        tone(tmp_path / "good.wav", seconds=0.5)
        tone(tmp_path / "short.wav", seconds=0.02)
        (tmp_path / "text.wav").write_text("no sound")
        (tmp_path / "empty.wav").touch()
        account = self.kept(
            keys, tmp_path, "good.wav", "short.wav", "text.wav", "empty.wav", "absent.wav", 5
        ).ledger.accounts["bad"]
        assert (account.kept, account.num_dropped) == (1, 5)
        told = [f"{reason}: {rows}" for reason, rows in account.dropped_rows.items()]
        for words in (
            "Qwen2AudioProcessor writes no token for audio of",
            "is an empty file, not audio",
            "cannot be read as audio",
            "which is not a file",
            "of column 'audios' is a number, not a path",
        ):
            assert any(words in line for line in told), (words, told)
        assert all(
            any(f"row {number}" in line for line in told) and (number > 5 or any(name in line for line in told))
            for number, name in enumerate(("short.wav", "text.wav", "empty.wav", "absent.wav", ""), start=2)
        ), told

    @pytest.mark.parametrize("rule", ["truncate", "drop", "error"])
    def test_what_the_window_leaves_out_is_told_and_on_overlong_decides(self, keys, tmp_path, rule):
        tone(tmp_path / "good.wav", seconds=0.5)
        tone(tmp_path / "long.wav", seconds=4)
        if rule == "error":
            with pytest.raises(
                DataError, match=r"row 2: .*long\.wav' has 4 s of sound, and the model hears the first 2 s"
            ):
                self.kept(keys, tmp_path, "good.wav", "long.wav", on_overlong=rule)
            return
        data = self.kept(keys, tmp_path, "good.wav", "long.wav", on_overlong=rule)
        account = data.ledger.accounts["bad"]
        assert (account.kept, account.media_cut) == ((2, 1) if rule == "truncate" else (1, 0))
        if rule == "truncate":
            assert "1 longer than the model hears, of which the beginning is learned" in data.ledger.summary()[0]
            assert max(len(data.table[n]["input_ids"]) for n in range(2)) < 100
        else:
            assert any("long.wav" in line for lines in account.dropped_rows.values() for line in lines)


def test_a_model_that_does_not_hear_is_refused_before_data_are_read(keys, tmp_path):
    from tests.media_models import tiny_llava

    (tmp_path / "rows.json").write_text("no rows")
    given = {**keys, "model_name_or_path": str(tiny_llava(tmp_path / "model")), "output_dir": str(tmp_path / "out")}
    with pytest.raises(
        ModelError, match="audio: LlavaProcessor: it has no token that stands for audio -> take another"
    ):
        luthier.train(given)


@pytest.mark.parametrize(
    ("model_type", "processor", "why"),
    [
        ("voxtral", "VoxtralProcessor", "its chat template is part of the library mistral_common"),
        ("granite_speech", "GraniteSpeechProcessor", "its model switches on an adapter of its own"),
    ],
)
def test_models_whose_audio_is_not_trained_are_refused_by_name(keys, tmp_path, model_type, processor, why):
    """Before data are read, and without the libraries that their processors need."""
    from transformers import AutoConfig

    from tests.tiny import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path / "model")
    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "processor_config.json").write_text(json.dumps({"processor_class": processor}))
    info = json.loads((Path(keys["dataset_dir"]) / "dataset_info.json").read_text())
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": info["rows"]}))
    (tmp_path / "rows.json").write_text("no rows")
    given = {**keys, "dataset_dir": str(tmp_path), "train_from_scratch": True, "output_dir": str(tmp_path / "out")}
    with pytest.raises(ModelError, match=f"^audio: {processor}: {why}.* -> take another model, or remove the column"):
        luthier.train({**given, "model_name_or_path": str(tmp_path / "model")})


def test_gemma3n_writes_equally_many_tokens_for_each_file(keys, tmp_path):
    """Its ids are those of its processor, whose window is 30 seconds."""
    folder = gemma3n_without_weights(tmp_path / "model")
    data, text = rows_of({**keys, "model_name_or_path": str(folder)}, needs_weights=False)
    processor = text.media.processor
    rows = json.loads((Path(keys["dataset_dir"]) / "rows.json").read_text())
    for number, row in enumerate(rows):
        messages = as_talk(keys, row, row["messages"][1]["content"])
        own = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
        assert list(data.table[number]["input_ids"]) == list(own)
        assert list(own).count(processor.audio_token_id) == 6 * len(row["audios"])
    account = data.ledger.accounts["rows"]
    assert (account.audios, account.media_cut) == (9, 0)


def test_a_conversation_about_sounds_is_that_of_training(keys, tmp_path):
    files = [str(tone(tmp_path / f"{n}.wav", seconds=0.3 + n)) for n in range(2)]
    chat = luthier.chat({"model_name_or_path": keys["model_name_or_path"], "max_new_tokens": 4, "do_sample": False})
    chat.conversation.show(files[0], "audio")
    answer = chat.ask("first", audios=files[1:])
    row = chat.conversation.as_row()
    assert row["audios"] == files and row["messages"][0]["content"] == "<audio><audio>first"
    processor = AutoProcessor.from_pretrained(keys["model_name_or_path"])
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(talk("first", "", [Path(file) for file in files])[:1], **options)
    model = AutoModelForMultimodalLM.from_pretrained(keys["model_name_or_path"])
    banned = [processor.audio_token_id]
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=banned)
    own = processor.tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == own.rstrip("\ufffd")  # a character that is cut is not shown
    with pytest.raises(InvalidInput, match=r"audio: nowhere\.wav: there is no such file"):
        chat.ask("what", audios=["nowhere.wav"])
    with pytest.raises(InvalidInput, match="this model does not read images"):
        from tests.media_models import draw

        chat.ask("what", images=[str(draw(tmp_path / "a.png"))])


def test_a_request_sends_audio_as_openai_does(keys, tmp_path):
    import base64

    from luthier.config.load import load_infer
    from luthier.data.media.kinds import media_kind
    from luthier.serve.convert import conversation
    from luthier.serve.errors import ApiError
    from luthier.serve.images import ImageRules
    from luthier.serve.loading import load_model
    from luthier.serve.protocol import ChatMessage

    file = tone(tmp_path / "a.wav", seconds=0.5)
    data = base64.b64encode(file.read_bytes()).decode()
    model, release = load_model(load_infer({"model_name_or_path": keys["model_name_or_path"]}), None, ImageRules())
    try:
        words = {"type": "text", "text": "what?"}
        part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        asked = conversation([ChatMessage(role="user", content=[part, words])], rules=model.images)
        assert [media_kind("audio").item(str(item).partition(":")[2]) for item in asked.items] == list(asked.items)
        session = luthier.chat({"model_name_or_path": keys["model_name_or_path"]})
        assert list(model.prompt_ids(asked, "", None)) == list(session.conversation.ask("what?", audios=[str(file)]))
        bad = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
        with pytest.raises(ApiError, match=r"messages\[0\]\.content\[0\]: this audio file cannot be read"):
            conversation([ChatMessage(role="user", content=[bad, words])], rules=model.images)
        with pytest.raises(ApiError, match="input_audio: this field is required, as an object with data"):
            conversation([ChatMessage(role="user", content=[{"type": "input_audio"}, words])], rules=model.images)
    finally:
        release()
