"""Teach a small model to see, from nothing, in three minutes on a CPU: what color and shape is in this image?

    python examples/see.py

It draws 2,400 images of 48x48 pixels, six colors and four shapes, makes a model of the LLaVA form with 0.8 M random
weights, trains it with examples/see.yaml, and asks it about 120 new images. Black images are the control.
"""

import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path("see")
SIDE, NUM_IMAGES, NUM_ASKED = 48, 2400, 120
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 190),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
QUESTION = "What is this?"
MARK = "<image>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    f"{{% if part.type == 'image' %}}{MARK}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def drawn(color: str, shape: str, chance: random.Random) -> Any:
    """The shape at any place, in any size, on a dark ground."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), tuple(chance.randrange(0, 60) for _ in range(3)))
    radius = chance.randrange(14, 21)
    x, y = (chance.randrange(radius + 1, SIDE - radius - 1) for _ in range(2))
    box, ink, pen = (x - radius, y - radius, x + radius, y + radius), COLORS[color], ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, ink)
    elif shape == "square":
        pen.rectangle(box, ink)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], ink)
    else:
        arm = radius // 3
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), ink)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), ink)
    return image


def draw(folder: Path, num_images: int, *, seed: int, answers: Sequence[str] = ("color", "shape")) -> list[dict]:
    """Write images and return their rows. `answers`: what an answer names."""
    folder.mkdir(parents=True, exist_ok=True)
    chance, rows = random.Random(seed), []
    for number in range(num_images):
        named = {"color": chance.choice(list(COLORS)), "shape": chance.choice(SHAPES)}
        path = folder / f"{number}.png"
        drawn(named["color"], named["shape"], chance).save(path)
        messages = [
            {"role": "user", "content": f"<image>{QUESTION}"},
            {"role": "assistant", "content": " ".join(named[answer] for answer in answers)},
        ]
        rows.append({"messages": messages, "images": [str(path.resolve())]})
    return rows


def black(path: Path) -> None:
    """An image that shows nothing."""
    from PIL import Image

    Image.new("RGB", (SIDE, SIDE)).save(path)


def write_data(folder: Path, rows: list[dict]) -> None:
    (folder / "shapes.json").write_text(json.dumps(rows), encoding="utf-8")
    info = {
        "shapes": {
            "file_name": "shapes.json",
            "formatting": "openai",
            "columns": {"messages": "messages", "images": "images"},
        }
    }
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


def byte_tokenizer() -> Any:
    """One token for each byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", MARK)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": MARK},
    )


def make_model(folder: Path) -> None:
    """A vision tower, a projector and a language model with random weights, and their processor."""
    import torch
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": SIDE,
            "patch_size": 16,
            "vision_use_head": False,
            **sizes,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 264,
            "max_position_embeddings": 256,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            **sizes,
        },
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    images = CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    print(f"{folder}: {sum(weight.numel() for weight in model.parameters()):,} weights")


def share_right(chat: Any, rows: list[dict], images: Sequence[str]) -> float:
    """The share of answers about `images` that are those of `rows`."""
    right = 0
    for row, image in zip(rows, images, strict=True):
        question, answer = row["messages"]
        chat.clear()
        found = chat.ask(question["content"].removeprefix("<image>"), images=[image])
        right += found.strip() == answer["content"]
    return right / len(rows)


def main() -> None:
    import yaml

    import luthier

    start = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    write_data(FOLDER / "data", draw(FOLDER / "data" / "images", NUM_IMAGES, seed=0))
    make_model(FOLDER / "model")
    unseen = draw(FOLDER / "new", NUM_ASKED, seed=1)
    control = FOLDER / "black.png"
    black(control)
    luthier.train(yaml.safe_load(Path(__file__).with_name("see.yaml").read_text(encoding="utf-8")))
    chat = luthier.chat({"model_name_or_path": str(FOLDER / "out"), "temperature": 0, "max_new_tokens": 16})
    new = share_right(chat, unseen, [row["images"][0] for row in unseen])
    blind = share_right(chat, unseen, [str(control)] * NUM_ASKED)
    print(f"{NUM_ASKED} new images: {new:.0%} right; black images: {blind:.0%}; {time.monotonic() - start:.0f} s")
    if new < 0.85 or blind > 0.15:
        sys.exit("see: the model does not see")


if __name__ == "__main__":
    main()
