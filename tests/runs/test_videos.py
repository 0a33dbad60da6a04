"""Runs on videos: the ids are those of the processor, a batch has the loss of its rows alone, and stages learn."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

import luthier
from luthier.core.errors import InvalidInput, ModelError
from luthier.data.media.frames import listed
from tests import films
from tests.hearing_models import tone
from tests.matrix import representatives
from tests.media_models import SHORT_RUN, draw
from tests.omni_models import FAMILIES, in_order
from tests.runs.test_audio import rows_of
from tests.runs.test_images import STAGES, losses

pytest.importorskip("av")

SLOTS = {
    "qwen2_vl": ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
    "qwen2_5_vl": ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
    "qwen3_vl": ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
    "glm4v": ("<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"),
    "internvl": ("<IMG_CONTEXT>", "<video>"),
    "llava_onevision": ("<image>", "<video>"),
    "gemma4": ("<|image|>", "<|video|>"),
    "qwen2_5_omni": ("<|vision_bos|><|IMAGE|><|vision_eos|>", "<|vision_bos|><|VIDEO|><|vision_eos|>"),
}
PARTS: dict[str, dict[str, Any]] = {
    "internvl": {"size": {"height": 28, "width": 28}},
    "llava_onevision": {"size": {"height": 28, "width": 28}},
    "gemma4": {"patch_size": 4},
}
"""What the part for videos of a tiny model is like."""
STACKS = ("internvl", "llava_onevision")
"""All videos of a batch must have equally many frames."""
SOUND = "<|audio_bos|><|AUDIO|><|audio_eos|>"
LIMITS = {"video_max_pixels": 56 * 56, "video_min_pixels": 28 * 28, "video_fps": 1.0}


def write(folder: Path, family: str) -> dict[str, Any]:
    """A model, a video of 5 seconds, one of 2, an image and data with one row for each of them and one for all."""
    FAMILIES[family](folder / "model")
    image, video = SLOTS[family]
    processor = AutoProcessor.from_pretrained(folder / "model")
    marks = {"image": image, "video": video} | ({"audio": SOUND} if "omni" in family else {})
    processor.chat_template = processor.tokenizer.chat_template = in_order(**marks)
    for name, value in PARTS.get(family, {}).items():
        setattr(processor.video_processor, name, value)
    processor.save_pretrained(folder / "model")
    films.film(folder / "long.mp4", range(0, 200, 5), rate=8)
    films.film(folder / "short.mkv", range(0, 160, 10), rate=8, noisy=True)
    if family in STACKS:
        films.film(folder / "short.mkv", range(0, 120, 3), rate=8)
    draw(folder / "a.png", height=56, width=84)
    tone(folder / "a.wav", seconds=0.5)
    sound = ["a.wav"] if "omni" in family else []
    talks = [
        ("<video>what?", ["long.mp4"], [], []),
        ("which <video>?", ["short.mkv"], [], []),
        ("words alone", [], [], []),
        ("<image>it?", [], ["a.png"], []),
        ("<video> and <image>" + "<audio>" * len(sound) + "?", ["short.mkv"], ["a.png"], sound),
    ]
    if family == "glm4v":
        talks = [one for one in talks if not one[2]]
    rows = [
        {
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"left {number}"}],
            "videos": videos, "images": images, "audios": sounds,
        }
        for number, (text, videos, images, sounds) in enumerate(talks)
    ]  # fmt: skip
    images_too = ["images"] if family != "glm4v" else []
    columns = {name: name for name in ("messages", "videos", *images_too, *(["audios"] if sound else []))}
    pairs = [
        {**row, "messages": row["messages"][:1], "chosen": row["messages"][1],
         "rejected": {"role": "assistant", "content": "right"}}
        for row in rows
    ]  # fmt: skip
    both = {"chosen": "chosen", "rejected": "rejected"}
    info = {
        "rows": {"file_name": "rows.json", "formatting": "openai", "columns": columns},
        "pairs": {"file_name": "pairs.json", "formatting": "openai", "ranking": True, "columns": columns | both},
    }
    for name, content in (("rows", rows), ("pairs", pairs), ("dataset_info", info)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return {
        "model_name_or_path": str(folder / "model"),
        "dataset_dir": str(folder),
        "dataset": "rows",
        **SHORT_RUN,
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "cutoff_len": 4096,
        "per_device_train_batch_size": 5,
        "max_steps": 2,
        **LIMITS,
    }


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made: dict[str, dict[str, Any]] = {}

    def of(family: str) -> dict[str, Any]:
        if family not in made:
            made[family] = write(tmp_path_factory.mktemp(family), family)
        return made[family]

    return of


def whole_video(path: Path):
    """(all frames, what the processor is told), read without any code of ours."""
    import av
    import numpy as np
    from transformers.video_utils import VideoMetadata

    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return frames, VideoMetadata(len(frames), fps=8.0, width=64, height=48, duration=len(frames) / 8)


def parts_of(text: str) -> list[dict[str, str]]:
    """A content as processors take it, of one with tags."""
    pieces = re.split("<(image|video|audio)>", text)
    parts = [
        {"type": "text", "text": piece} if number % 2 == 0 else {"type": piece} for number, piece in enumerate(pieces)
    ]
    return [part for part in parts if part.get("text") != ""]


def processors_own(
    processor: Any, folder: Path, row: dict[str, Any], heard: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """What the processor makes of a row; it samples the frames of whole videos itself. `heard`: the sound of videos,
    which stand before audio files."""
    from PIL import Image
    from transformers.audio_utils import load_audio

    text = processor.apply_chat_template(
        [{**message, "content": parts_of(message["content"])} for message in row["messages"]]
    )
    given: dict[str, Any] = {}
    if row["images"]:
        given["images"] = [[Image.open(folder / name) for name in row["images"]]]
    if row["videos"]:
        found = [whole_video(folder / name) for name in row["videos"]]
        given["videos"] = [frames for frames, _ in found]
        settings = {"video_metadata": [told for _, told in found], "do_sample_frames": True}
        if "Omni" in type(processor).__name__:
            settings["fps"] = processor.video_processor.fps
        given["videos_kwargs"] = settings
    if row["audios"]:
        given["audio"] = [load_audio(str(folder / name), 16_000, backend="soundfile") for name in row["audios"]]
    if heard is not None and row["videos"]:
        given["audio"] = [*(heard[name] for name in row["videos"]), *given.get("audio", ())]
        sources = [*range(len(row["videos"])), *[None] * len(row["audios"])]
        given |= {"load_audio_from_video": True, "audio_from_video_indices": sources}
    types = {"return_mm_token_type_ids": True}
    return processor(text=[text], return_tensors="pt", **given, **types)


@pytest.mark.parametrize("family", SLOTS)
def test_ids_are_those_of_the_processor_and_a_batch_has_the_loss_of_its_rows(worlds, family):
    require_same_ids_and_losses(worlds(family))


def require_same_ids_and_losses(keys: dict[str, Any], heard: Mapping[str, Any] | None = None) -> None:
    """As transformers alone: the ids of each row, and the loss of all in one batch, padded and concatenated."""
    from luthier.data.collate import concatenate_rows
    from luthier.model.attention import isolate_samples, isolates_samples
    from luthier.model.heads.output_head import inspect_head
    from luthier.model.types import Models
    from luthier.stages._causal import next_token_loss
    from luthier.training.parts import collator
    from luthier.workflow.seeing import pixels_of, samples_with_media

    data, text = rows_of(keys)
    processor, folder = text.media.processor, Path(keys["dataset_dir"])
    rows = json.loads((folder / "rows.json").read_text())
    made = [data.table[number] for number in range(len(rows))]
    model = AutoModelForMultimodalLM.from_pretrained(keys["model_name_or_path"]).eval()
    for weight in model.parameters():
        weight.data.mul_(2)
    types = "mm_token_type_ids"
    expected = 0.0
    for own, row in zip(made, rows, strict=True):
        inputs = processors_own(processor, folder, row, heard)
        assert list(own["input_ids"]) == inputs["input_ids"][0].tolist(), row
        pixels = pixels_of(model, text.media)
        if pixels.token_types is None:
            inputs.pop(types, None)
        elif pixels.token_types != types:
            inputs[pixels.token_types] = inputs.pop(types)
        sounds = {"use_audio_in_video": True} if heard is not None and row["videos"] else {}
        with torch.no_grad():
            logits = model(**inputs, **sounds).logits[0]
        labels = torch.tensor(own["labels"])
        expected += torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum").item()
    reason = isolates_samples(model, lambda base: samples_with_media(pixels))
    loss = []
    for concatenates in (False, True) if reason is None else (False,):
        if concatenates:
            isolate_samples(model)
        batch = collator(256, concatenate_rows if concatenates else None, pixels=pixels)(made)
        with torch.no_grad():
            loss.append(next_token_loss(Models(model, inspect_head(model)), batch).total.item())
    assert loss == pytest.approx([expected] * len(loss), rel=1e-4)


@pytest.mark.parametrize("stage", representatives(["sft", "dpo", "orpo", "gkd"], "sft", "dpo"))
@pytest.mark.parametrize("family", representatives(SLOTS, "qwen3_vl", "qwen2_5_omni"))
def test_stages_learn_from_videos(worlds, family, stage, tmp_path):
    keys = {**worlds(family), **STAGES.get(stage, {}), "output_dir": str(tmp_path)}
    if stage == "gkd":
        keys["teacher_model"] = keys["model_name_or_path"]
    found = losses(luthier.train(keys))
    assert len(found) == 2 and (stage == "gkd" or found[-1] < found[0])  # the teacher is the student


def test_a_conversation_about_a_video(worlds, tmp_path):
    keys = worlds("qwen3_vl")
    folder = Path(keys["dataset_dir"])
    given = {"model_name_or_path": keys["model_name_or_path"], "max_new_tokens": 3, **LIMITS}
    session = luthier.chat(given)
    ids = session.conversation.ask("what?", videos=[str(folder / "long.mp4")])
    data, _ = rows_of(keys)
    trained = data.table[0]
    prompt = [token for token, label in zip(trained["input_ids"], trained["labels"], strict=True) if label == -100]
    assert list(ids) == prompt
    session.conversation.unanswered()
    assert isinstance(session.ask("what?", videos=[str(folder / "short.mkv")]), str)
    frames = [str(draw(tmp_path / f"{number}.png", height=56, width=84, seed=number)) for number in range(4)]
    assert isinstance(session.ask("and this?", videos=[frames]), str)
    row = session.conversation.as_row()
    assert [listed(path) for path in row["videos"][1:]] == [frames]
    with pytest.raises(InvalidInput, match=r"^video: nowhere\.png: there is no such file$"):
        session.ask("what?", videos=[[frames[0], "nowhere.png"]])


def test_images_and_videos_that_the_model_cannot_take_together(worlds, tmp_path):
    keys = worlds("glm4v")
    folder = Path(keys["dataset_dir"])
    info = json.loads((folder / "dataset_info.json").read_text())
    info["rows"] = {**info["rows"], "columns": {**info["rows"]["columns"], "images": "images"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(ModelError, match="images, videos: Glm4vProcessor: its model takes one of the two in a batch"):
        luthier.train({**keys, "dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "out")})


def test_a_model_without_videos_is_refused_by_name(worlds, tmp_path):
    from tests.media_models import tiny_llava

    keys = {**worlds("qwen2_vl"), "model_name_or_path": str(tiny_llava(tmp_path / "m")), "output_dir": str(tmp_path)}
    with pytest.raises(ModelError, match="videos: LlavaProcessor: it has no token that stands for a video"):
        luthier.train(keys)
