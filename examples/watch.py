"""Teach a small model to watch, from nothing, in three minutes on a CPU: does this dot move left or right?

    python examples/watch.py

It draws 800 videos of four frames, makes a model of the Qwen2-VL form with 0.4 M random weights, trains it with
examples/watch.yaml, and asks it about 100 new videos. The same frames in another order are the control.
"""

import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path("watch")
SIDE, RADIUS, NUM_FRAMES, NUM_VIDEOS, NUM_ASKED = 28, 4, 4, 800, 100
QUESTION, ANSWERS = "Where does it go?", ("left", "right")
MARKS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def frames(answer: str, chance: Any) -> list[Any]:
    """A light dot on a dark ground, which goes 2 to 4 pixels to one side from frame to frame."""
    import numpy as np
    from PIL import Image

    step = int(chance.integers(2, 5))
    way = step * (NUM_FRAMES - 1)
    start, y = int(chance.integers(RADIUS, SIDE - RADIUS - way)), int(chance.integers(RADIUS, SIDE - RADIUS))
    places = [start + step * number for number in range(NUM_FRAMES)]
    rows, columns = np.mgrid[:SIDE, :SIDE]
    drawn = []
    for x in places if answer == "right" else places[::-1]:
        image = chance.integers(0, 40, (SIDE, SIDE, 3))
        image[(rows - y) ** 2 + (columns - x) ** 2 <= RADIUS**2] = 230
        drawn.append(Image.fromarray(image.astype(np.uint8)))
    return drawn


def make(folder: Path, num_videos: int, *, seed: int) -> list[dict]:
    """Write the frames of videos and return their rows."""
    import numpy as np

    chance, rows = np.random.default_rng(seed), []
    for number in range(num_videos):
        answer = ANSWERS[int(chance.integers(2))]
        place = folder / str(number)
        place.mkdir(parents=True, exist_ok=True)
        paths = []
        for count, frame in enumerate(frames(answer, chance)):
            frame.save(place / f"{count}.png")
            paths.append(str((place / f"{count}.png").resolve()))
        messages = [{"role": "user", "content": f"<video>{QUESTION}"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "videos": [paths]})
    return rows


def shuffled(rows: list[dict], *, seed: int) -> list[dict]:
    """Each video with its frames in any order, and once more in the reverse of this order. So who tells the direction
    from the order is wrong about one of the two."""
    import numpy as np

    chance, found = np.random.default_rng(seed), []
    for row in rows:
        order = chance.permutation(NUM_FRAMES)
        found += [{**row, "videos": [[row["videos"][0][place] for place in one]]} for one in (order, order[::-1])]
    return found


def write_data(folder: Path, rows: list[dict]) -> None:
    (folder / "dots.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"messages": "messages", "videos": "videos"}
    info = {"dots": {"file_name": "dots.json", "formatting": "openai", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


def byte_tokenizer() -> Any:
    """One token for each byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *MARKS.values())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=MARKS
    )


def make_model(folder: Path) -> None:
    """A vision tower that takes two frames at a time, a language model with random weights, and their processor."""
    import torch
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = byte_tokenizer()
    spread = {"initializer_range": 0.1}  # so narrow a model learns nothing from the usual 0.02
    config = Qwen2VLConfig(
        vision_config={"depth": 1, "embed_dim": 64, "hidden_size": 96, "num_heads": 4, "mlp_ratio": 2, **spread},
        text_config={
            **spread,
            "vocab_size": 264,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]},
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in MARKS},
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    size = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    print(f"{folder}: {sum(weight.numel() for weight in model.parameters()):,} weights")


def share_right(chat: Any, rows: list[dict]) -> float:
    """The share of right answers about the videos of `rows`."""
    right = 0
    for row in rows:
        chat.clear()
        right += chat.ask(QUESTION, videos=row["videos"]).strip() == row["messages"][1]["content"]
    return right / len(rows)


def main() -> None:
    import yaml

    import luthier

    if importlib.util.find_spec("torchvision") is None or importlib.util.find_spec("av") is None:
        sys.exit("watch: torchvision or av is not installed: pip install 'luthier[video]'")
    start = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    write_data(FOLDER / "data", make(FOLDER / "data" / "frames", NUM_VIDEOS, seed=0))
    make_model(FOLDER / "model")
    unseen = make(FOLDER / "new", NUM_ASKED, seed=1)
    luthier.train(yaml.safe_load(Path(__file__).with_name("watch.yaml").read_text(encoding="utf-8")))
    chat = luthier.chat({"model_name_or_path": str(FOLDER / "out"), "temperature": 0, "max_new_tokens": 8})
    new, control = share_right(chat, unseen), share_right(chat, shuffled(unseen[: NUM_ASKED // 2], seed=2))
    print(f"{NUM_ASKED} new videos: {new:.0%} right; shuffled: {control:.0%}; {time.monotonic() - start:.0f} s")
    if new < 0.9 or control > 0.6:
        sys.exit("watch: the model does not watch")


if __name__ == "__main__":
    main()
