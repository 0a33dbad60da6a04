"""Every answer that is learned ends in a token at which generation stops, whatever format and tokenizer."""

import pytest

from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.chat.template_slots import choose_template
from luthier.data.plans.dialogues import DIALOGUES
from luthier.data.plans.feedback import FEEDBACK
from luthier.data.plans.pairs import PAIRS
from luthier.data.rows.encoding import Encoding
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.data.rows.maker import encoded_rows
from luthier.data.rows.row_plan import RowSettings
from luthier.data.rows.tokenize import turn_ids
from luthier.data.templates import Token, template_names
from luthier.data.types import Dialogue, Feedback, Message, Preference
from luthier.model.tokenizer import FittedTokenizer, fit_tokenizer
from luthier.workflow.endings import has_end, with_end
from tests.chat_programs import PROGRAMS, tokenizer_with
from tests.tiny import byte_tokenizer

MESSAGES = (
    Message("user", "Hi"),
    Message("assistant", "Hello7"),
    Message("user", "And?"),
    Message("assistant", "Bye9"),
)
EXAMPLES = {
    "sft": (DIALOGUES, Dialogue(MESSAGES)),
    "dpo": (PAIRS, Preference(MESSAGES[:1], MESSAGES[1], MESSAGES[3])),
    "kto": (FEEDBACK, Feedback(MESSAGES, liked=True)),
}


def settled(name: str, tokenizer, vocab_size: int | None = None) -> tuple[Encoding, FittedTokenizer]:
    """As for a run: a format fitted to a tokenizer, and the end of its answers. `vocab_size`: of the embedding."""
    template = choose_template(name, tokenizer)
    slots = (template.prefix, template.system, template.user, template.assistant, template.call_slots)
    own = [piece.text for slot in slots for piece in slot if isinstance(piece, Token)]
    tokenizer.add_tokens(own, special_tokens=True)
    fitted = fit_tokenizer(
        tokenizer,
        stop_words=template.stop_words,
        replace_eos=template.replace_eos and vocab_size is None,
        vocab_size=vocab_size,
    )
    if name == "auto":
        template = choose_template(name, tokenizer)
    encoder = Encoder(tokenizer)
    program = ModelChatTemplate(encoder) if name == "auto" and tokenizer.chat_template else None
    return with_end(Encoding(encoder, template, None, model_template=program), fitted.stop_token_ids), fitted


def require_ends(encoding: Encoding, stop_ids: tuple[int, ...]) -> None:
    """After the last letter of each answer there is a target that is a stop token, before any text that follows."""
    letters = [encoding.encoder.text(text)[-1] for text in ("Hello7", "Bye9")]
    for plan, example in EXAMPLES.values():
        written = tuple(plan.write(example, encoding, RowSettings()))
        turns = [turn_ids(encoding.encoder, row) for row in written]
        rows = encoded_rows(plan, example, written, turns, encoding, RowSettings())
        for part in (part for row in rows for part in row):
            learned = [label for label in part.labels if label != IGNORE_INDEX]
            assert learned and any(token in stop_ids for token in learned)
            num_answers = sum(letter in learned for letter in letters)
            assert sum(token in stop_ids for token in learned) >= num_answers
            last = max(index for index, token in enumerate(learned) if token in letters)
            assert any(token in stop_ids for token in learned[last + 1 :])


@pytest.mark.parametrize("vocab_size", [None, 261], ids=["stop words are added", "no room for stop words"])
@pytest.mark.parametrize("name", template_names())
def test_named_formats(name, vocab_size):
    encoding, fitted = settled(name, byte_tokenizer(), vocab_size)
    assert has_end(encoding, fitted.stop_token_ids)
    require_ends(encoding, fitted.stop_token_ids)


@pytest.mark.parametrize("eos", ["</s>", None], ids=["eos", "no eos"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_chat_templates_of_models(name, eos):
    encoding, fitted = settled("auto", tokenizer_with(name, eos_token=eos))
    require_ends(encoding, fitted.stop_token_ids)


@pytest.mark.parametrize("eos", ["</s>", None], ids=["eos", "no eos"])
@pytest.mark.parametrize("name", ["auto", "empty"])
def test_no_chat_template_at_all(name, eos):
    """The answers end in the eos: within the row, or after the conversation where the format has no place for it."""
    encoding, fitted = settled(name, byte_tokenizer(eos_token=eos))
    assert fitted.stop_token_ids == (encoding.encoder.tokenizer.eos_token_id,)
    require_ends(encoding, fitted.stop_token_ids)
    assert encoding.template.efficient_eos == (name == "empty")


def test_a_format_with_an_end_stays_as_it_is():
    encoding, fitted = settled("chatml", byte_tokenizer())
    assert with_end(encoding, fitted.stop_token_ids) is encoding
    assert not has_end(encoding, (1,)) and with_end(encoding, (1,)).template.efficient_eos
