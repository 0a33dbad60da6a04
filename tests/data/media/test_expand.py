"""Rows with images: the ids are those of the processor, blocks are whole or absent, and no label lies in one."""

import random

import pytest

from luthier.data.chat.encoder import TextWithSpans
from luthier.data.media.expand import expanded_text, slots_of
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.data.types import PLACE, Span
from tests.data.media.rows import TAG, answer, random_row, row, user
from tests.torchvision_models import FAMILIES

NUM_ROWS = 24


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_processor(worlds, family):
    see, chance = worlds(family), random.Random(family)
    rows = [random_row(see, chance, in_answers=family not in ("llava", "llava_next")) for _ in range(NUM_ROWS)]
    made, account, _ = see.made(rows)
    assert account.kept == NUM_ROWS, account.dropped
    for data, (_, [(part,)]) in zip(rows, made, strict=True):
        assert part.input_ids == see.processors_own(data)
    assert account.images == sum(len(data["images"]) for data in rows)
    assert account.tokens == sum(len(part.input_ids) for _, [(part,)] in made)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"train_on_prompt": True}, {"mask_history": True}], ids=str)
def test_blocks_are_whole_or_absent(worlds, family, settings):
    """Random rows, each truncated to a random length: 0 to 3 images in 1 to 3 turns."""
    see, chance = worlds(family), random.Random(f"{family} {settings}")
    image_ids = set(see.text.media.processor.image_token_ids)
    for _ in range(NUM_ROWS):
        data = random_row(see, chance, in_answers=family not in ("llava", "llava_next"))
        [(_, [(whole,)])], _, _ = see.made([data], **settings)
        cutoff_len = chance.randint(8, len(whole.input_ids) + 4)
        made, account, maker = see.made([data], cutoff_len=cutoff_len, **settings)
        assert account.rows_in == 1 == account.kept + account.num_dropped
        if not made:
            continue
        [(example, [(part,)])] = made
        assert len(part.input_ids) == len(part.labels) <= cutoff_len
        blocks = [part.input_ids[start:stop] for start, stop in pairs(part.blocks)]
        theirs = [whole.input_ids[start:stop] for start, stop in pairs(whole.blocks)]
        assert blocks == [theirs[item] for item in part.items]
        assert part.items == sorted(set(part.items))
        if not settings.get("mask_history"):
            assert part.items == list(range(len(blocks)))
        num_image_tokens = sum(token in image_ids for token in part.input_ids)
        assert num_image_tokens == sum(token in image_ids for block in blocks for token in block)
        for start, stop in pairs(part.blocks):
            assert set(part.labels[start:stop]) == {IGNORE_INDEX}
        for token, label in zip(part.input_ids, part.labels, strict=True):
            assert label in (IGNORE_INDEX, token)
        paths = maker.values(example, (part,))[-1]
        assert [path.rpartition("/")[2] for path in paths] == [data["images"][item] for item in part.items]
        assert account.images == len(part.items)
        assert account.images + account.images_left_out == len(data["images"])
        assert account.tokens == len(part.input_ids)
        assert account.tokens + account.lost_tokens == len(whole.input_ids)
        assert account.image_tokens == sum(map(len, blocks))
        assert account.labeled_tokens + account.lost_labeled_tokens == whole.num_labels


def pairs(blocks):
    return list(zip(blocks[::2], blocks[1::2], strict=True))


class TestWrittenOut:
    """One row of two images of 56x84 and 40x100 pixels, in numbers: 256 and more are special tokens."""

    def made(self, worlds, family, template="auto"):
        see = worlds(family, template)
        data = row(user(f"a{TAG}b{TAG}c"), answer("d"), images=[see.image(56, 84), see.image(40, 100)])
        [(_, [(part,)])], account, _ = see.made([data])
        names = see.text.tokenizer
        word = {token: names.convert_tokens_to_ids(token) for token in names.all_special_tokens}
        return part, account, word, names

    def text(self, names, part):
        return names.decode(part.input_ids)

    def test_paddleocr_vl(self, worlds):
        part, account, word, names = self.made(worlds, "paddleocr_vl")
        start, pad, end = (word[f"<|IMAGE_{name}|>"] for name in ("START", "PLACEHOLDER", "END"))
        im_start, im_end, (a, b, c) = 257, 258, names.encode("abc")
        question = [im_start, *names.encode("user\n"), a, start, *[pad] * 6, end, b, start, *[pad] * 4, end, c]
        reply = [*names.encode("d"), im_end, *names.encode("\n")]
        opening = [im_end, *names.encode("\n"), im_start, *names.encode("assistant\n")]
        assert part.input_ids == [*question, *opening, *reply]
        assert part.blocks == [7, 15, 16, 22]
        assert part.labels == [IGNORE_INDEX] * len([*question, *opening]) + reply
        assert (account.images, account.image_tokens) == (2, 14)

    def test_llava(self, worlds):
        """Its chat template moves images in front of the text."""
        part, account, _, names = self.made(worlds, "llava")
        assert self.text(names, part).startswith(
            "<|im_start|>user\n<image><image><image><image>\n<image><image><image><image>\nabc<|im_end|>"
        )
        assert part.blocks == [6, 10, 11, 15]
        assert (account.images, account.image_tokens) == (2, 8)

    def test_idefics3(self, worlds):
        part, account, _, names = self.made(worlds, "idefics3")
        tile = "<fake_token_around_image><row_{}_col_{}><image>"
        top, low = tile.format(1, 1) + tile.format(1, 2) + "\n", tile.format(2, 1) + tile.format(2, 2) + "\n"
        whole = "\n<fake_token_around_image><global-img><image><fake_token_around_image>"
        assert self.text(names, part).startswith(f"<|im_start|>user\na{top}{low}{whole}b{top}{whole}c<|im_end|>")
        assert part.blocks == [7, 26, 27, 39]
        assert (account.images, account.image_tokens) == (2, 31)

    def test_gemma3(self, worlds):
        """Its block holds its mark, and begins and ends in line breaks, which are no part of the image."""
        part, account, _, names = self.made(worlds, "gemma3")
        block = f"\n\n<start_of_image>{'<image_soft_token>' * 4}<end_of_image>\n\n"
        assert self.text(names, part).startswith(f"<|im_start|>user\na{block}b{block}c<|im_end|>")
        assert part.blocks == [9, 15, 20, 26]
        assert (account.images, account.image_tokens) == (2, 12)

    def test_a_named_format_writes_what_the_models_own_has_around_an_image(self, worlds):
        own, *_ = self.made(worlds, "paddleocr_vl")
        named, *_ = self.made(worlds, "paddleocr_vl", "chatml")
        assert named.input_ids == own.input_ids
        assert named.blocks == own.blocks


def test_a_format_of_a_family_writes_its_own_text_around_an_image():
    assert slots_of("qwen2vl")["image"] == "<|vision_start|>{{media}}<|vision_end|>"
    assert slots_of("base") == {}


class TestTruncation:
    def row(self, see):
        return row(
            user(f"{TAG} one"), answer("first"), user(f"two {TAG}"), answer("second"),
            images=[see.image(56, 84), see.image(112, 112)],
        )  # fmt: skip

    def test_a_turn_without_room_for_its_answer_is_left_out_with_its_image(self, worlds):
        see = worlds("paddleocr_vl")
        [(_, [(part,)])], account, _ = see.made([self.row(see)], cutoff_len=64)
        assert part.items == [0]
        assert (account.images, account.images_left_out) == (1, 1)
        assert see.text.tokenizer.decode(part.input_ids).endswith("first<|im_end|>\n")

    def test_text_of_the_prompt_goes_from_its_end(self, worlds):
        see = worlds("paddleocr_vl")
        data = row(user(f"12345678 {TAG} 123456789"), answer("abcdefgh"), images=[see.image(56, 84)])
        [(_, [(whole,)])], _, _ = see.made([data])
        [(_, [(part,)])], account, _ = see.made([data], cutoff_len=len(whole.input_ids) - 15)
        text = see.text.tokenizer.decode(part.input_ids)
        assert "<|IMAGE_END|><|im_end|>\n<|im_start|>assistant\nabc" in text.replace(" ", "")
        assert text.startswith("<|im_start|>user\n1234")
        assert account.shortened_prompts == 1

    def test_a_row_whose_first_turn_has_no_room_is_dropped_with_its_numbers(self, worlds):
        see = worlds("paddleocr_vl")
        made, account, _ = see.made([self.row(see)], cutoff_len=20)
        assert not made
        assert list(account.dropped) == [
            "its …, which leaves too little of cutoff_len 20 for the answer -> raise cutoff_len, or lower"
            " image_max_pixels"
        ]
        assert "2 images are 26 tokens" in account.dropped_rows[next(iter(account.dropped))][0]


def test_spans_with_a_loss_move_along(worlds):
    """A span counts the characters of the data, where an image is its tag."""
    see = worlds("paddleocr_vl")
    question = f"ab{TAG}cd"
    data = row({**user(question), "loss": [[9, 11, 0.5]]}, answer("ef"), images=[see.image(28, 28)])
    for world in (see, worlds("paddleocr_vl", "chatml")):
        [(_, [(part,)])], _, _ = world.made([data])
        weighed = [token for token, weight in zip(part.input_ids, part.weights, strict=True) if weight == 0.5]
        assert weighed == world.text.tokenizer.encode("cd")
        [start, stop] = part.blocks
        assert set(part.labels[start:stop]) == {IGNORE_INDEX}


def test_blocks_go_in_from_left_to_right():
    text, (span,) = expanded_text(f"a{PLACE}b{PLACE}c", iter([f"<{PLACE}>", "xy"]), [Span(2, 5, 1.0)])
    assert text == f"a<{PLACE}>bxyc"
    assert text[span.start : span.end] == "bxyc"


def test_borders_move_along(worlds):
    see = worlds("llava")
    seen = see.text.encoding.media.seen([str(see.folder / see.image(28, 28))])
    whole = seen.expanded(TextWithSpans(f"a{PLACE}b", (2, 3)))
    assert whole == TextWithSpans("a<image><image><image><image>b", (29, 30))


def test_a_model_whose_blocks_depend_on_each_other_keeps_all_images_or_none(worlds, monkeypatch):
    """As LLaVA-OneVision, which needs torchvision."""
    see = worlds("paddleocr_vl")
    data = TestTruncation().row(see)
    monkeypatch.setitem(see.text.media.__dict__, "is_joint", True)
    made, account, _ = see.made([data], cutoff_len=64)
    assert not made
    assert next(iter(account.dropped)).startswith("truncation to cutoff_len would leave out an image")
    assert see.made([data])[1].images == 2


def test_a_chat_template_that_leaves_images_out(worlds, monkeypatch):
    see, slot = worlds("paddleocr_vl"), "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    program = see.text.tokenizer.chat_template.replace(slot, f"{{% if message == messages[0] %}}{slot}{{% endif %}}")
    monkeypatch.setattr(see.text.tokenizer, "chat_template", program)
    name = see.image(28, 28)
    good = row(user(f"a{TAG}"), answer("b"), user("c"), answer("d"), images=[name])
    bad = row(user("a"), answer("b"), user(f"c{TAG}"), answer("d"), images=[name])
    _, account, _ = see.made([good, bad])
    assert account.kept == 1
    assert list(account.dropped) == ["the model's own chat template writes … of … images"]
