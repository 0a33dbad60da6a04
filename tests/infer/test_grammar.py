"""Answers that follow a schema, whatever the logits say."""

import json

import pytest
import torch

from luthier.infer.grammar import ANY_OBJECT, GrammarFault, Grammars, json_grammar, lark_grammar
from tests.tiny import byte_tokenizer

pytest.importorskip("llguidance")
V, EOS = 320, 260
TOKENIZER = byte_tokenizer()
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars():
    return Grammars(TOKENIZER, [EOS])


def written(matcher, generator, limit=300):
    """The text of random allowed tokens, up to the end token."""
    ids = []
    for _ in range(limit):
        scores = matcher.mask(torch.rand(V, generator=generator))
        ids.append(int(scores.argmax()))
        matcher.advance(ids[-1])
        if ids[-1] == EOS:
            return TOKENIZER.decode(ids[:-1])
    raise AssertionError("the answer does not end")


def test_every_answer_that_a_schema_lets_through_is_valid(grammars):
    generator = torch.Generator().manual_seed(0)
    found = [json.loads(written(grammars.matcher(json_grammar(SCHEMA), V), generator)) for _ in range(10)]
    assert all(one["city"] in ("Rome", "Oslo") and 0 <= one["days"] <= 9 and len(one) == 2 for one in found)


def test_any_object_begins_with_a_brace(grammars):
    allowed = grammars.matcher(json_grammar(ANY_OBJECT), V).mask(torch.zeros(V))
    brace, *others = TOKENIZER.encode("{[1x", add_special_tokens=False)
    assert not torch.isinf(allowed[brace]) and torch.isinf(allowed[[*others, EOS]]).all()


def test_text_may_hold_a_schema(grammars):
    grammar = lark_grammar(f'start: "<call>" body "</call>"\nbody: %json {json.dumps(SCHEMA)}')
    text = written(grammars.matcher(grammar, V), torch.Generator().manual_seed(1))
    assert text.startswith("<call>{") and text.endswith("}</call>")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [({"$ref": "#/nowhere"}, "nowhere"), ({"type": "wrong"}, "wrong"), ({"minimum": "a"}, "minimum")],
)
def test_a_faulty_schema_is_refused_with_its_fault(schema, reason):
    with pytest.raises(GrammarFault, match=f"the schema cannot be used: .*{reason}"):
        json_grammar(schema)


def test_leaving_the_grammar_is_a_fault(grammars):
    with pytest.raises(GrammarFault, match="has left its grammar"):
        grammars.matcher(json_grammar(SCHEMA), V).advance(TOKENIZER.encode("x")[0])


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GrammarFault, match=r"pip install 'luthier\[grammar\]'"):
        json_grammar(ANY_OBJECT)


def test_a_slow_tokenizer_cannot_follow_a_grammar():
    class Slow:
        is_fast = False

    with pytest.raises(GrammarFault, match="fast tokenizer"):
        Grammars(Slow(), [EOS]).matcher(json_grammar(ANY_OBJECT), V)
