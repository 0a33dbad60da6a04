"""Random rows with images, videos and audio: the ids are those of the processor, blocks are whole or absent, no label
lies in one, and the ledger adds up."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from luthier.config.load import load_train
from luthier.data.media.kinds import media_kind, path_in
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.data.sources.dataset_info import Columns, DatasetSpec, Source
from luthier.workflow.text import load_text_side
from tests.data.media.rows import World, answer, user
from tests.hearing_models import tiny_qwen2_audio, tone
from tests.matrix import representatives
from tests.media_models import draw
from tests.runs.test_videos import LIMITS, processors_own, write

pytest.importorskip("soundfile")

NUM_ROWS = 12
KINDS = {
    "qwen2_audio": ("audio",),
    "qwen2_5_omni": ("image", "video", "audio"),
    "qwen3_vl": ("image", "video"),
    "qwen2_vl": ("image", "video"),
}
FILES = {
    "image": ("a.png", "b.png"),
    "video": ("long.mp4", "short.mkv"),
    "audio": ("a.wav", "b.flac", "cut.wav"),
}
"""What the model hears of the last one is its beginning."""
COLUMNS = {kind: media_kind(kind).column for kind in FILES}


@dataclass(frozen=True)
class MixedWorld(World):
    kinds: tuple[str, ...] = ()

    @property
    def spec(self) -> DatasetSpec:
        columns = Columns(messages="messages", **{COLUMNS[kind]: COLUMNS[kind] for kind in self.kinds})
        return DatasetSpec(
            name="see", source=Source("file", "see.json"), formatting="openai", columns=columns, columns_given=True,
            media_dir=str(self.folder),
        )  # fmt: skip

    def processors_own(self, data: Any) -> list[int]:
        return processors_own(self.text.media.processor, self.folder, data)["input_ids"][0].tolist()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made: dict[str, MixedWorld] = {}

    def of(family: str) -> MixedWorld:
        if family not in made:
            made[family] = mixed_world(tmp_path_factory.mktemp(family), family)
        return made[family]

    return of


def mixed_world(folder: Path, family: str) -> MixedWorld:
    kinds = KINDS[family]
    if "video" in kinds:
        pytest.importorskip("av")
        write(folder, family)
    else:
        tiny_qwen2_audio(folder / "model")
    draw(folder / "a.png", height=56, width=84)
    draw(folder / "b.png", height=40, width=100)
    for name, seconds, rate in (("a.wav", 0.5, 16_000), ("b.flac", 0.8, 8_000), ("cut.wav", 3.0, 16_000)):
        tone(folder / name, seconds=seconds, rate=rate)
    columns = {name: name for name in ("messages", *(COLUMNS[kind] for kind in kinds))}
    info = {"see": {"file_name": "see.json", "formatting": "openai", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    keys = {"model_name_or_path": str(folder / "model"), "dataset": "see", "dataset_dir": str(folder)}
    limits = LIMITS if "video" in kinds else {}
    run = load_train({**keys, **limits, "template": "auto", "output_dir": str(folder / "out")})
    return MixedWorld(folder, load_text_side(run), kinds)


def random_row(world: MixedWorld, chance: random.Random) -> tuple[dict[str, Any], list[str]]:
    """(a row of 1 to 3 turns with 0 to 2 items each, the names of their files in the order of the text)."""

    def words() -> str:
        return "".join(chance.choices("abc d\n", k=chance.randrange(1, 24)))

    names: list[str] = []
    row: dict[str, Any] = {"messages": [], **{column: [] for column in COLUMNS.values()}}
    for _ in range(chance.randint(1, 3)):
        text = words()
        for _ in range(chance.choice((0, 1, 1, 2))):
            kind = chance.choice(world.kinds)
            names.append(chance.choice(FILES[kind]))
            row[COLUMNS[kind]].append(names[-1])
            text += f"<{kind}>{words()}"
        row["messages"] += [user(text), answer(f"{words()}.")]
    return row, names


@pytest.mark.parametrize("family", representatives(KINDS, "qwen2_audio", "qwen2_5_omni"))
def test_ids_are_those_of_the_processor(worlds, family):
    world, chance = worlds(family), random.Random(family)
    rows = [random_row(world, chance)[0] for _ in range(NUM_ROWS)]
    made, account, _ = world.made(rows)
    assert account.kept == NUM_ROWS, account.dropped
    for data, (_, [(part,)]) in zip(rows, made, strict=True):
        assert part.input_ids == world.processors_own(data)
    for kind, column in COLUMNS.items():
        assert account.of_kind(media_kind(kind))[0] == sum(len(data[column]) for data in rows)
    assert account.media_cut == sum(data["audios"].count("cut.wav") for data in rows)


@pytest.mark.parametrize("family", representatives(KINDS, "qwen2_audio", "qwen2_5_omni"))
@pytest.mark.parametrize("settings", [{}, {"train_on_prompt": True}, {"mask_history": True}], ids=str)
def test_blocks_are_whole_or_absent(worlds, family, settings):
    """Each row is truncated to a random length."""
    world, chance = worlds(family), random.Random(f"{family} {settings}")
    processor = world.text.media.processor
    placeholders = {token for kind in world.kinds for token in getattr(processor, f"{kind}_token_ids")}
    num_cut = 0
    for _ in range(NUM_ROWS):
        data, names = random_row(world, chance)
        [(_, [(whole,)])], _, _ = world.made([data], **settings)
        cutoff_len = chance.randint(8, len(whole.input_ids) + 4)
        made, account, maker = world.made([data], cutoff_len=cutoff_len, **settings)
        assert account.rows_in == 1 == account.kept + account.num_dropped
        if not made:
            continue
        [(example, [(part,)])] = made
        num_cut += len(part.items) < len(names)
        assert len(part.input_ids) == len(part.labels) <= cutoff_len
        bounds = pairs(part.blocks)
        blocks = [part.input_ids[start:stop] for start, stop in bounds]
        theirs = [whole.input_ids[start:stop] for start, stop in pairs(whole.blocks)]
        assert blocks == [theirs[item] for item in part.items] and part.items == sorted(set(part.items))
        inside = {place for start, stop in bounds for place in range(start, stop)}
        assert all(place in inside for place, token in enumerate(part.input_ids) if token in placeholders)
        assert all(part.labels[place] == IGNORE_INDEX for place in inside)
        assert all(label in (IGNORE_INDEX, token) for token, label in zip(part.input_ids, part.labels, strict=True))
        kept = [path_in(item).rpartition("/")[2] for item in maker.values(example, (part,))[-1]]
        assert kept == [names[item] for item in part.items]
        counts = [account.of_kind(media_kind(kind)) for kind in COLUMNS]
        assert [count + left_out for count, _, left_out in counts] == [len(data[column]) for column in COLUMNS.values()]
        assert sum(tokens for _, tokens, _ in counts) == len(inside)
        assert account.tokens + account.lost_tokens == len(whole.input_ids)
        assert account.labeled_tokens + account.lost_labeled_tokens == whole.num_labels
    assert num_cut, "some of the rows lose items"


def pairs(blocks):
    return list(zip(blocks[::2], blocks[1::2], strict=True))
