"""Rows with images, and what the processor of a model makes of them."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.config.load import load_train
from luthier.core.kinds import STAGES
from luthier.data.rows.account import DatasetAccount
from luthier.data.rows.encoding import Encoding
from luthier.data.rows.labels import Encoded
from luthier.data.rows.maker import RowMaker
from luthier.data.rows.row_plan import RowSettings
from luthier.data.sources.dataset_info import Columns, DatasetSpec, Source
from luthier.data.sources.readers import Row
from luthier.workflow.text import TextSide, load_text_side
from tests.media_models import draw

TAG = "<image>"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def row(*messages: Mapping[str, Any], images: Sequence[Any] = ()) -> dict[str, Any]:
    return {"messages": list(messages), "images": list(images)}


@dataclass(frozen=True)
class World:
    """A model that sees, and images in its folder."""

    folder: Path
    text: TextSide

    @property
    def spec(self) -> DatasetSpec:
        columns = Columns(messages="messages", images="images", chosen="chosen", rejected="rejected")
        return DatasetSpec(
            name="see", source=Source("file", "see.json"), formatting="openai", columns=columns, columns_given=True,
            media_dir=str(self.folder),
        )  # fmt: skip

    def image(self, height: int, width: int, seed: int = 0) -> str:
        name = f"{height}x{width}-{seed}.png"
        if not (self.folder / name).is_file():
            draw(self.folder / name, height=height, width=width, seed=seed)
        return name

    def made(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        stage: str = "sft",
        spec: DatasetSpec | None = None,
        on_overlong: str = "truncate",
        cutoff_len: int | None = None,
        **settings: bool,
    ) -> tuple[list[tuple[Any, list[tuple[Encoded, ...]]]], DatasetAccount, RowMaker]:
        """(example, rows) of each usable row, the account, and what made them."""
        plan = STAGES.get(stage).rows
        encoding: Encoding = replace(self.text.encoding, cutoff_len=cutoff_len)
        maker = RowMaker(plan, RowSettings(**settings), encoding, on_overlong, 8)
        account = DatasetAccount()
        source = (Row("see.json", number, data) for number, data in enumerate(rows, start=1))
        return list(maker.rows(source, spec or self.spec, account)), account, maker

    def processors_own(self, data: Mapping[str, Any]) -> list[int]:
        """The ids that the processor gives for the messages and images of a row, the text and pixels together."""
        from PIL import Image

        processor = self.text.media.processor
        messages = [{**message, "content": parts_of(message["content"])} for message in data["messages"]]
        text = processor.apply_chat_template(messages)
        images = [Image.open(self.folder / name) for name in data["images"]]
        found = processor(text=[text], images=[images] if images else None, return_tensors="pt")
        return found["input_ids"][0].tolist()


def parts_of(content: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(TAG)):
        parts += [{"type": "image"}] * bool(number) + [{"type": "text", "text": text}] * bool(text)
    return parts or [{"type": "text", "text": ""}]


def world(folder: Path, make: Any, template: str = "auto", **keys: Any) -> World:
    """`make`: a function of `tests.media_models`."""
    import json

    folder.mkdir(exist_ok=True)
    info = {
        "see": {
            "file_name": "see.json",
            "formatting": "openai",
            "columns": {"messages": "messages", "images": "images"},
        }
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    if not (folder / "model").is_dir():
        make(folder / "model")
    values = {"model_name_or_path": str(folder / "model"), "dataset": "see", "dataset_dir": str(folder)}
    run = load_train({**values, "template": template, "output_dir": str(folder / "out"), **keys})
    return World(folder, load_text_side(run))


def random_row(world: World, chance: random.Random, *, in_answers: bool = False) -> dict[str, Any]:
    """0 to 3 images in 1 to 3 turns."""
    places = [chance.randrange(3) for _ in range(chance.randrange(4))]
    messages, images = [], []
    for turn in range(chance.randint(1, 3)):
        for role in (user, answer):
            words = ["".join(chance.choices("abc d\n", k=chance.randrange(1, 24))) for _ in range(4)]
            number = places.count(turn) if role is user or (in_answers and chance.random() < 0.3) else 0
            images += [world.image(28 * chance.randint(1, 4), chance.randint(20, 112), seed=0) for _ in range(number)]
            text = "".join(word + TAG * (place < number) for place, word in enumerate(words))
            messages.append(role(text if role is user else f"{text}."))
    return row(*messages, images=images)
