"""Many rows at once give, row by row, the ids that each gives by itself; every format, fast and not."""

import itertools
import threading

import pytest

from luthier.data.chat.encoder import Encoder, TextWithSpans
from luthier.data.chat.render import render
from luthier.data.rows.tokenize import NUM_BATCHES_AHEAD, ahead, num_begun_empty, turn_ids
from luthier.data.templates import get_template, template_names
from luthier.data.types import Message
from luthier.model.files.sources import ModelSource
from tests.tiny import byte_tokenizer

TALK = (
    Message("user", "Grüße, \N{SNOWMAN} 日本語 <|im_end|> twice"),
    Message("assistant", " leading blank\n\nand  gaps "),
    Message("user", "Grüße, \N{SNOWMAN} 日本語 <|im_end|> twice"),
    Message("assistant", ""),
)


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    from luthier.model.tokenizer import load_tokenizer

    (model,) = smollm2_folder.rglob("*.gguf")
    return load_tokenizer(ModelSource(str(model)))


def written(name: str):
    template = get_template(name)
    return [render(template, TALK[:2], purpose="train"), render(template, TALK, system="s", purpose="train")]


def alone(encoder: Encoder, rows):
    return [[(encoder.pieces(turn.prompt), encoder.pieces(turn.answer)) for turn in row] for row in rows]


# These two name tokens that only their own tokenizers have.
@pytest.mark.parametrize("name", [name for name in template_names() if name not in ("chatglm3", "yuan")])
@pytest.mark.parametrize("splits", [False, True])
def test_every_format(name, splits, smollm2):
    for tokenizer in (byte_tokenizer(), smollm2):
        encoder = Encoder(tokenizer, split_special_tokens=splits)
        rows = [row for row in written(name) if _is_known(encoder, row)]
        assert turn_ids(encoder, rows) == alone(encoder, rows)


def _is_known(encoder: Encoder, rows) -> bool:
    from luthier.core.errors import ModelError

    try:
        alone(encoder, [rows])
    except ModelError:  # a token that this tokenizer lacks
        return False
    return True


def test_whole_texts_between_others(smollm2):
    encoder = Encoder(smollm2)
    whole = TextWithSpans("a question  an answer", (11, 21))
    first, second, third = turn_ids(encoder, [written("chatml")[0], whole, written("chatml")[1]])
    assert [first, third] == alone(encoder, written("chatml"))
    (turn,) = second
    assert list(turn) == encoder.parts(whole.text, whole.borders)
    assert turn[0] + turn[1] == encoder.text(whole.text)


def test_ahead_keeps_the_order_and_works_in_a_thread_of_its_own():
    read: list[int] = []

    def batches():
        for number in range(10):
            read.append(number)
            yield number

    for number, (batch, result) in enumerate(ahead(batches(), lambda n: (n * n, threading.get_ident()))):
        assert (batch, result[0]) == (number, number * number)
        assert result[1] != threading.get_ident()
        assert len(read) <= number + 1 + NUM_BATCHES_AHEAD


def test_ahead_passes_on_what_goes_wrong():
    with pytest.raises(ZeroDivisionError):
        list(ahead([1, 0, 2], lambda n: 1 / n))


@pytest.mark.parametrize("gap", ["", " and more"])
def test_empty_thoughts_in_a_text_of_the_models_own_chat_template(gap):
    """A prompt that ends in an empty thought teaches none."""
    empty, parts = "<think>\n\n</think>\n\n", ["Q", "A", "Q", "A"]
    for prompts, answers in itertools.product(itertools.product([False, True], repeat=2), repeat=2):
        texts = [parts[0] + empty * prompts[0], empty * answers[0] + parts[1]]
        texts += [parts[2] + empty * prompts[1], empty * answers[1] + parts[3]]
        borders = tuple(itertools.accumulate(map(len, texts)))
        row = TextWithSpans("".join(texts) + gap, borders)
        assert num_begun_empty(row, get_template("empty"), only_last=False) == sum(answers)
        assert num_begun_empty(row, get_template("empty"), only_last=True) == answers[1]
