"""Messages that say how much of the loss they carry, from the file to the loss.

The byte tokenizer gives one token per character (of ASCII), so weights can be read off the text.
"""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.config.load import load_train
from luthier.core.errors import RowError
from luthier.core.kinds import FORMATS, STAGES
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.collate import collate, concatenate_rows, model_inputs, pad_rows
from luthier.data.packing.best_fit import Packs
from luthier.data.prepare import prepare
from luthier.data.rows.encoding import Encoding
from luthier.data.rows.labels import IGNORE_INDEX, Encoded
from luthier.data.rows.maker import encoded_rows
from luthier.data.rows.table import Table
from luthier.data.rows.tokenize import turn_ids
from luthier.data.sources.dataset_info import parse_description
from luthier.data.templates import Token, get_template, template_names
from luthier.data.types import Dialogue, Message, Span, ToolCall
from luthier.inspection.terminal import without_colors
from luthier.stages.sft import STAGE, SftConfig
from luthier.workflow.text import load_text_side
from tests import tiny
from tests.chat_programs import CHATML


def chatml(tokenizer, **changes) -> Encoding:
    return Encoding(Encoder(tokenizer), get_template("chatml"), **{"cutoff_len": 500, **changes})


def own_program(program: str = CHATML) -> Encoding:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = program
    encoder = Encoder(tokenizer)
    return Encoding(encoder, get_template("chatml"), 500, model_template=ModelChatTemplate(encoder))


def rows_of(talk: Dialogue, encoding: Encoding, config: SftConfig | None = None) -> list[Encoded]:
    settings = STAGE.rows.settings(config or SftConfig())
    written = STAGE.rows.write(talk, encoding, settings)
    turns = [[own] for own in turn_ids(encoding.encoder, [part for (part,) in written])]
    return [row for (row,) in encoded_rows(STAGE.rows, talk, written, turns, encoding, settings)]


def shown(row: Encoded, encoding: Encoding) -> str:
    columns = {"input_ids": row.input_ids, "labels": row.labels, "weights": row.weights}
    return without_colors(columns, encoding.encoder.tokenizer)


def talk_of(*losses, texts=("ab", "cd", "ef", "gh")) -> Dialogue:
    roles = ("user", "assistant") * (len(texts) // 2)
    return Dialogue(tuple(Message(r, t, loss) for r, t, loss in zip(roles, texts, losses, strict=True)))


HEAD = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
NEXT = "<|im_start|>user\nef<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>\n"
LOSSES = {
    "an answer that is not learned": ((None, 0.0, None, None), f"{HEAD}cd{END}{NEXT}⟦gh{END}⟧"),
    "an answer that counts by half": ((None, 0.5, None, None), f"{HEAD}⟦cd{END}⟧×0.5{NEXT}⟦gh{END}⟧"),
    "a question that is learned": (
        (None, 0.0, 1.0, 1.0),
        f"{HEAD}cd{END}<|im_start|>user\n⟦ef⟧{END}<|im_start|>assistant\n⟦gh{END}⟧",
    ),
    "a part of an answer": (
        (None, 0.0, None, (Span(1, 2, 0.25),)),
        f"{HEAD}cd{END}{NEXT}⟦g⟧⟦h⟧×0.25⟦{END}⟧",
    ),
    "a part of a question": (
        ((Span(0, 1, 1.0),), 0.0, None, 0.0),
        f"<|im_start|>user\n⟦a⟧b{END}<|im_start|>assistant\ncd{END}{NEXT}gh{END}",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_counts_how_much(tokenizer, name):
    losses, expected = LOSSES[name]
    encoding = chatml(tokenizer)
    (row,) = rows_of(talk_of(*losses), encoding)
    assert shown(row, encoding) == expected


@pytest.mark.parametrize("name", LOSSES)
def test_the_models_own_chat_template_gives_the_same(name):
    losses, expected = LOSSES[name]
    encoding = own_program()
    (row,) = rows_of(talk_of(*losses), encoding)
    assert shown(row, encoding) == f"<|im_start|>system\nYou are a kind assistant.{END}{expected}"


def test_the_words_of_a_question_are_found_beside_the_same_words_of_the_format(tokenizer):
    """`user` stands in the mark of the role, too."""
    encoding = chatml(tokenizer)
    (row,) = rows_of(talk_of(1.0, None, texts=("user", "x")), encoding)
    assert shown(row, encoding) == f"<|im_start|>user\n⟦user⟧{END}<|im_start|>assistant\n⟦x{END}⟧"


def test_line_breaks_are_found_beside_those_of_the_format():
    """Three line breaks hold two of them at two places."""
    encoding = own_program()
    (row,) = rows_of(talk_of(1.0, None, texts=("\n\n", "x")), encoding)
    learned = f"<|im_start|>user\n⟦\n\n⟧{END}<|im_start|>assistant\n⟦x{END}⟧"
    assert shown(row, encoding).endswith(learned)


@pytest.mark.parametrize("question", ["user", " user", "user "])
def test_a_later_question_is_found_however_its_chat_template_trims_it(question):
    """`user` stands in the mark of every role."""
    encoding = own_program(CHATML.replace("message.content", "message.content | trim"))
    (row,) = rows_of(talk_of(None, None, 1.0, None, texts=("ab", "cd", question, "gh")), encoding)
    assert shown(row, encoding).endswith(f"⟦cd{END}⟧<|im_start|>user\n⟦user⟧{END}<|im_start|>assistant\n⟦gh{END}⟧")


def test_messages_go_before_the_keys_of_the_run(tokenizer):
    encoding = chatml(tokenizer)
    (history,) = rows_of(talk_of(None, 0.5, None, None), encoding, SftConfig(mask_history=True))
    assert shown(history, encoding) == f"{HEAD}⟦cd{END}⟧×0.5{NEXT}⟦gh{END}⟧"
    (prompts,) = rows_of(talk_of(0.0, None, None, None), encoding, SftConfig(train_on_prompt=True))
    learned = f"⟦{END}<|im_start|>assistant\ncd{END}{NEXT}gh{END}⟧"
    assert shown(prompts, encoding) == f"⟦<|im_start|>user\n⟧ab{learned}"


@pytest.mark.parametrize("config", [SftConfig(), SftConfig(mask_history=True), SftConfig(train_on_prompt=True)])
@pytest.mark.parametrize("template", ["chatml", "glm4", "llama2", "breeze"])
@pytest.mark.parametrize("answers", [("cd", "gh"), ("", "gh"), ("cd", ""), ("", "")])
def test_weights_of_one_change_nothing(tokenizer, config, template, answers):
    """What the keys say anyway, said by the messages: the same rows, the same account of what was cut."""
    texts = ("ab", answers[0], "ef", answers[1])
    plain = talk_of(None, None, None, None, texts=texts)
    spoken = talk_of(None, 0.0 if config.mask_history else 1.0, None, 1.0, texts=texts)
    for cutoff_len in (None, *range(2, 110)):
        encoding = Encoding(Encoder(tokenizer), get_template(template), cutoff_len)
        assert rows_of(spoken, encoding, config) == rows_of(plain, encoding, config)


def test_the_end_of_an_empty_answer_has_the_weight_of_the_answer(tokenizer):
    """It has no other token where the format ends the conversation and not the answer."""
    encoding = Encoding(Encoder(tokenizer), get_template("breeze"), 500)
    (row,) = rows_of(talk_of(None, 0.25, None, 0.5, texts=("ab", "", "ef", "")), encoding)
    ends = [(label, w) for label, w in zip(row.labels, row.weights, strict=True) if label != IGNORE_INDEX]
    assert ends == [(tokenizer.eos_token_id, 0.25), (tokenizer.eos_token_id, 0.5)]
    (row,) = rows_of(talk_of(None, 0.0, None, 0.0, texts=("ab", "", "ef", "")), encoding)
    assert not row.num_labels
    (row,) = rows_of(talk_of(None, (), 0.5, (), texts=("ab", "", "ef", "")), encoding)
    assert [w for w in row.weights if w] == [1.0, 0.5, 0.5, 1.0]


@pytest.mark.parametrize("template", template_names())
def test_every_format_gives_each_token_a_weight(template):
    tokenizer, chosen = tiny.byte_tokenizer(), get_template(template)
    slots = (chosen.prefix, chosen.system, chosen.user, chosen.assistant, chosen.call_slots, chosen.observation)
    tokenizer.add_tokens(
        [piece.text for slot in slots for piece in slot if isinstance(piece, Token)], special_tokens=True
    )
    encoding = Encoding(Encoder(tokenizer), chosen, None)
    (row,) = rows_of(talk_of((Span(0, 1, 0.5),), 0.5, 0.75, (Span(0, 2, 0.25),)), encoding)
    assert len(row.weights) == len(row.input_ids)
    by_weight = {
        weight: bytes(t for t, w in zip(row.input_ids, row.weights, strict=True) if w == weight and t < 256)
        for weight in set(row.weights)
    }
    text = {w: encoding.encoder.tokenizer.decode(list(ids)) for w, ids in by_weight.items()}
    assert "a" in text[0.5] and "cd" in text[0.5] and text[0.75] == "ef" and text[0.25] == "gh"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_spans_fall_on_the_characters_they_name(data):
    """Any text, any spans: the characters of the tokens of a weight are those of the span."""
    text = data.draw(st.text(st.characters(codec="ascii", categories=("L", "N", "P", "Zs")), min_size=1, max_size=12))
    edges = sorted(data.draw(st.sets(st.integers(0, len(text)), min_size=2, max_size=6)))
    spans = tuple(Span(a, b, 0.5) for a, b in zip(edges[::2], edges[1::2], strict=False))
    encoding = chatml(tiny.byte_tokenizer(), cutoff_len=None)
    (row,) = rows_of(talk_of(None, spans, texts=("q", text)), encoding)
    half = [t for t, w in zip(row.input_ids, row.weights, strict=True) if w == 0.5]
    assert encoding.encoder.tokenizer.decode(half) == "".join(text[s.start : s.end] for s in spans)


BAD = {
    "a word": ("much", "'loss' of message 2 is text, not a number"),
    "above 1": (1.5, "'loss' of message 2 is 1.5, not from 0 to 1"),
    "no number": (float("nan"), "'loss' of message 2 is nan, not from 0 to 1"),
    "not three": ([[0, 1]], "part 1 of 'loss' of message 2 is a list, not [start, end, number]"),
    "halves": ([[0.5, 1, 1]], "part 1 of 'loss' of message 2: start and end must be whole numbers"),
    "beyond the end": ([[0, 9, 1]], "part 1 of 'loss' of message 2: 0 to 9 is not part of a text of 2 characters"),
    "overlap": ([[0, 2, 1], [1, 2, 0]], "the parts of 'loss' of message 2 are not in order, or share characters"),
}


@pytest.mark.parametrize("formatting", ["sharegpt", "openai"])
@pytest.mark.parametrize("name", BAD)
def test_bad_weights_are_refused_with_the_message(name, formatting):
    value, reason = BAD[name]
    with pytest.raises(RowError) as refusal:
        read(formatting, {"loss": value})
    assert str(refusal.value) == reason


def read(formatting: str, more: dict) -> Dialogue:
    spec, faults, _ = parse_description(
        "d", {"file_name": "d.json", "formatting": formatting}, root="", media_dir="", file="i", lines={}
    )
    assert spec is not None and not faults
    keys = ("from", "value", "human", "gpt") if formatting == "sharegpt" else ("role", "content", "user", "assistant")
    column = "conversations" if formatting == "sharegpt" else "messages"
    messages = [{keys[0]: keys[2], keys[1]: "ab"}, {keys[0]: keys[3], keys[1]: "cd", **more}]
    return FORMATS.get(formatting).read({column: messages}, spec)


@pytest.mark.parametrize("formatting", ["sharegpt", "openai"])
def test_both_conversation_formats_read_weights(formatting):
    assert read(formatting, {"loss": 0.5}).messages[1].loss == 0.5
    assert read(formatting, {"loss": [[0, 1, 0.5]]}).messages[1].loss == (Span(0, 1, 0.5),)
    assert read(formatting, {}).messages[1].loss is None


def test_what_the_chat_format_rewrites_cannot_be_weighed_in_part(tokenizer):
    call = json.dumps({"name": "f", "arguments": {}})
    talk = Dialogue((Message("user", "x"), Message("function", call, (Span(0, 2, 0.5),))))
    with pytest.raises(RowError):
        rows_of(talk, chatml(tokenizer))


def test_a_part_of_the_text_beside_a_thought_and_calls_can_be_weighed(tokenizer):
    """Spans are of the content; the thought and the calls have the weight of any answer."""
    answer = Message("function", "\nI look.", (Span(1, 2, 0.0),), thought="hm", calls=(ToolCall("f", {}),))
    encoding = Encoding(Encoder(tokenizer), get_template("qwen3"), 500)
    (row,) = rows_of(Dialogue((Message("user", "ab"), answer)), encoding)
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert shown(row, encoding) == f"{HEAD}⟦<think>\nhm\n</think>\n\n⟧I⟦ look.\n{call}{END}⟧"


ROWS = [
    {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4], "weights": [0.0, 1.0, 0.5, 0.25]},
    {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "weights": []},
]


@pytest.mark.parametrize("layout", [concatenate_rows, lambda rows: pad_rows(rows, 0)], ids=["concatenated", "padded"])
def test_the_loss_is_the_weighted_mean(llama_folder, layout):
    """sum_t w_t CE_t with the model's own logits, and sum_t w_t as its units."""
    from transformers import AutoModelForCausalLM

    from luthier.model.attention import isolate_samples
    from luthier.model.heads.output_head import inspect_head
    from luthier.model.types import Models

    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval()
    expected = torch.zeros(())
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels, weights = torch.tensor(row["labels"][1:]), torch.tensor(row["weights"][1:] or [0.0, 1.0])
        nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        expected = expected + (nll * weights).sum()
    isolate_samples(model)
    batch = collate(ROWS, layout)
    output = STAGE.loss(Models(model, inspect_head(model)), batch, SftConfig(), state={}, training=True)
    torch.testing.assert_close(output.total, expected, rtol=1e-5, atol=1e-5)
    assert STAGE.units(batch) == 1 + 0.5 + 0.25 + 1
    assert "weights" not in model_inputs(batch)


def test_packs_keep_the_weights_of_their_samples(tmp_path):
    import pyarrow as pa

    rows = Table(pa.Table.from_pylist([*ROWS, {"input_ids": [8, 9], "labels": [8, 9], "weights": []}]))
    for capacity, expected in (
        (9, [[0.0, 1.0, 0.5, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0]]),
        (4, [[0.0, 1.0, 0.5, 0.25], [], []]),
    ):
        found = [
            list(map(list, zip(*(column.to_pylist() for column in batch), strict=True)))
            for batch in Packs(capacity).join(rows)
        ]
        assert sorted((pack[2] for batch in found for pack in batch), key=len, reverse=True) == expected


@pytest.mark.parametrize("on_overlong", ["truncate", "split"])
def test_from_the_file_to_the_table(tmp_path, llama_folder, on_overlong):
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes, I will do so", "loss": [[0, 4, 0.5]]}]
    (tmp_path / "d.json").write_text(
        json.dumps([{"conversations": talk}, {"conversations": [talk[0], {"from": "gpt", "value": "no"}]}])
    )
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "d.json", "formatting": "sharegpt"}}))
    run = load_train(
        {
            "model_name_or_path": str(llama_folder),
            "dataset": "d",
            "dataset_dir": str(tmp_path),
            "template": "chatml",
            "output_dir": str(tmp_path / "out"),
            "cutoff_len": 32,
            "on_overlong": on_overlong,
        }
    )
    rows = list(prepare(run, STAGES.get("sft").rows, load_text_side(run).encoding).train)
    assert all(not row["weights"] or len(row["weights"]) == len(row["input_ids"]) for row in rows)
    learned = [
        (label, weight)
        for row in rows
        for label, weight in zip(row["labels"], row["weights"] or [1.0] * len(row["labels"]), strict=True)
        if label != IGNORE_INDEX
    ]
    half = [label for label, weight in learned if weight == 0.5]
    assert tiny.byte_tokenizer().decode(half) == "yes,"
    assert not rows[-1]["weights"]


@pytest.mark.parametrize("answer", ["so so", "s", " so "])
def test_a_span_is_found_in_an_earlier_answer_of_a_shared_row(answer):
    """Only the last answer of this chat template begins with an empty thought."""
    from luthier.data.chat.template_slots import template_from_slots
    from luthier.data.rows.loss_weights import weighted_rows
    from tests.chat_programs import tokenizer_with

    tokenizer = tokenizer_with("qwen3")
    program = ModelChatTemplate(Encoder(tokenizer))
    encoding = Encoding(program.encoder, template_from_slots(tokenizer), None, model_template=program)
    weighted = Message("assistant", answer, (Span(len(answer) - 1, len(answer), 0.0),))
    dialogue = Dialogue((Message("user", "s"), weighted, Message("user", "s"), Message("assistant", "s")))
    written = encoding.written(dialogue, keep_past_thinking=True)
    turns = turn_ids(program.encoder, written)
    (row,) = weighted_rows(dialogue, written, turns, encoding, train_on_prompt=False, mask_history=False)
    learned = tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX])
    assert learned == f"{answer[:-1]}<|im_end|>\n<think>\n\n</think>\n\ns<|im_end|>\n"
