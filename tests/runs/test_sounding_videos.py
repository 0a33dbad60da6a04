"""`use_audio_in_video`: the model hears the videos that it sees, and its processor puts the two together."""

import json
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.core.errors import InvalidInput
from tests import films
from tests.hearing_models import wave_of
from tests.runs.test_audio import rows_of
from tests.runs.test_images import losses
from tests.runs.test_videos import require_same_ids_and_losses, write

av = pytest.importorskip("av")
pytest.importorskip("soundfile")

RATE, SECONDS = 16_000, {"long.mp4": 1.5, "short.mkv": 1.0}


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict[str, Any]:
    """The data of `tests.runs.test_videos`, whose videos have sound."""
    folder = tmp_path_factory.mktemp("omni")
    found = write(folder, "qwen2_5_omni")
    for name, grays in (("long.mp4", range(0, 200, 5)), ("short.mkv", range(0, 160, 10))):
        films.film(folder / name, grays, rate=8, wave=wave_of(SECONDS[name], RATE, 300, 600))
    return {**found, "use_audio_in_video": True}


def sound_of(path: Path):
    """The samples at the rate of the file, read without any code of ours."""
    import numpy as np

    with av.open(str(path)) as container:
        parts = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    wave = np.concatenate(parts)
    return (wave / 2**15 if wave.dtype == np.int16 else wave).astype(np.float32)


def test_ids_are_those_of_the_processor_and_a_batch_has_the_loss_of_its_rows(keys):
    folder = Path(keys["dataset_dir"])
    require_same_ids_and_losses(keys, {name: sound_of(folder / name) for name in SECONDS})


def test_sound_stands_between_the_frames_it_belongs_to(keys):
    """A group of 2 frames is 2 seconds at one frame a second, and 2 seconds of sound are one chunk."""
    data, text = rows_of(keys)
    name = text.tokenizer.convert_ids_to_tokens
    first, stop = data.table[0]["blocks"][:2]
    block = [name(token) for token in data.table[0]["input_ids"][first:stop]]
    assert block[:2] == ["<|vision_bos|>", "<|audio_bos|>"] and block[-2:] == ["<|audio_eos|>", "<|vision_eos|>"]
    kinds = "".join({"<|VIDEO|>": "v", "<|AUDIO|>": "a"}.get(token, "") for token in block)
    heard, seen, a_group = kinds.count("a"), kinds.count("v"), kinds.index("a")
    assert 37 <= heard <= 41, "1.5 seconds, 25 tokens a second, and what the encoder fills its last frame with"
    assert 0 < a_group < seen and seen % a_group == 0
    assert kinds == "v" * a_group + "a" * heard + "v" * (seen - a_group)
    silent, _ = rows_of({**keys, "use_audio_in_video": False})
    assert len(data.table[0]["input_ids"]) == len(silent.table[0]["input_ids"]) + heard + 2


def test_a_model_learns_from_videos_with_sound(keys, tmp_path):
    found = losses(luthier.train({**keys, "max_steps": 4, "output_dir": str(tmp_path)}))
    assert found[-1] < found[0]


def test_videos_alone_need_no_column_of_audio(keys, tmp_path):
    """The batch of rows without videos has nothing to hear."""
    folder = Path(keys["dataset_dir"])
    rows = json.loads((folder / "rows.json").read_text())[:3]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    info = {"rows": {"file_name": "rows.json", "formatting": "openai",
                     "columns": {"messages": "messages", "videos": "videos"}}}  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    given = {**keys, "dataset_dir": str(tmp_path), "media_dir": str(folder), "per_device_train_batch_size": 1}
    assert len(losses(luthier.train({**given, "max_steps": 3, "output_dir": str(tmp_path / "out")}))) == 3


def test_videos_without_sound_are_named_and_long_sound_is_counted(keys, tmp_path):
    films.film(tmp_path / "silent.mp4", range(0, 80, 5))
    films.film(tmp_path / "much.mkv", range(0, 200, 5), wave=wave_of(4, RATE, 300, 600))
    ask = {"role": "user", "content": "<video>what?"}
    columns = {"messages": "messages", "videos": "videos"}
    rows = [
        {"messages": [ask, {"role": "assistant", "content": "up"}], "videos": [name]}
        for name in ("silent.mp4", "much.mkv")
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    info = {"rows": {"file_name": "rows.json", "formatting": "openai", "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    data, _ = rows_of({**keys, "dataset_dir": str(tmp_path), "media_dir": str(tmp_path)})
    account = data.ledger.accounts["rows"]
    assert (account.kept, account.num_dropped, account.media_cut) == (1, 1, 1)
    ((reason, lines),) = account.dropped_rows.items()
    assert "has no sound track, which use_audio_in_video needs" in reason
    assert "row 1" in lines[0] and "silent.mp4" in lines[0]
    whole, _ = rows_of({**keys, "dataset_dir": str(tmp_path), "media_dir": str(tmp_path), "use_audio_in_video": False})
    assert whole.ledger.accounts["rows"].kept == 2


def test_a_conversation_about_a_video_with_sound(keys, tmp_path):
    folder = Path(keys["dataset_dir"])
    limits = {name: value for name, value in keys.items() if name.startswith(("video_", "use_audio"))}
    chat = luthier.chat({"model_name_or_path": keys["model_name_or_path"], "max_new_tokens": 3, **limits})
    ids = chat.conversation.ask("what?", videos=[str(folder / "long.mp4")])
    trained = rows_of(keys)[0].table[0]
    assert list(ids) == [
        token for token, label in zip(trained["input_ids"], trained["labels"], strict=True) if label == -100
    ]
    chat.conversation.unanswered()
    assert isinstance(chat.ask("what?", videos=[str(folder / "short.mkv")]), str)
    silent = films.film(tmp_path / "silent.mp4", range(0, 80, 5))
    with pytest.raises(InvalidInput, match=r"silent\.mp4' has no sound track"):
        chat.ask("what?", videos=[str(silent)])
