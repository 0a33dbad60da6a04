"""`template: auto`: every answer stands behind the very ids that a server sends, and labels cover the answers."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.config.load import load_train
from luthier.core.errors import DataError, RowError
from luthier.core.kinds import STAGES, TOOL_SYNTAXES
from luthier.data.chat.continuation import without_empty_thought
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.chat.template_slots import template_from_slots
from luthier.data.prepare import prepare
from luthier.data.rows.encoding import Encoding, encode_last_turns
from luthier.data.rows.labels import IGNORE_INDEX, label_turns
from luthier.data.rows.tokenize import turn_ids
from luthier.data.types import Dialogue, Message, ToolCall
from luthier.workflow.text import load_text_side
from tests.chat_programs import ENDS, PROGRAMS, tokenizer_with
from tests.deep import DEPTHS, deep_tools
from tests.tiny import tiny_llama

TOKENIZERS = {name: tokenizer_with(name) for name in PROGRAMS}
WEATHER = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
CALL = json.dumps({"name": "weather", "arguments": {"city": "Rome", "days": [1, 2]}})
KEEPS_HISTORY = [name for name in PROGRAMS if name not in ("qwen3", "r1", "last question")]


def program(name: str, **options: Any) -> ModelChatTemplate:
    return ModelChatTemplate(Encoder(TOKENIZERS[name]), **options)


def talk(*contents: str, system: str | None = None) -> Dialogue:
    return Dialogue(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)), system)


def rows_of(program: ModelChatTemplate, dialogue: Dialogue) -> list[list[tuple[list[int], list[int]]]]:
    return turn_ids(program.encoder, program.rows(dialogue))


def plain(dialogue: Dialogue, end: int | None = None) -> list[dict[str, str]]:
    """Of a conversation without tools, up to message `end`."""
    head = [] if dialogue.system is None else [{"role": "system", "content": dialogue.system}]
    return head + [{"role": message.role, "content": message.content} for message in dialogue.messages[:end]]


def served(name: str, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """What an inference server makes of messages."""
    return TOKENIZERS[name].apply_chat_template(messages, tokenize=True, return_dict=False, **options)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["  blanks ", "\n\nlines\n", "<|im_end|>", "</s>", "你好", "🙂", "{{ x }}", "a</think>b"]
)


@st.composite
def dialogues(draw: st.DrawFn, name: str) -> Dialogue:
    """Conversations that the program `name` does not refuse."""
    contents = draw(st.lists(TEXTS, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
    if name == "last question":  # where the question is rewritten, it must be there to be found again
        contents = [text if text.strip() or i % 2 else "?" for i, text in enumerate(contents)]
    return talk(*contents, system=None if name == "gemma" else draw(st.sampled_from([None, "", "Be brief."])))


@pytest.mark.parametrize("name", KEEPS_HISTORY)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_conversation_is_one_row_with_the_ids_of_the_whole_rendering(name, data):
    dialogue = data.draw(dialogues(name))
    (row,) = rows_of(program(name), dialogue)
    assert [i for turn in row for part in turn for i in part] == served(name, plain(dialogue))


@pytest.mark.parametrize("name", PROGRAMS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_each_answer_follows_the_ids_that_a_server_sends(name, data):
    """In the order of the answers: what stands in the row before answer k is the prompt of messages 0..2k."""
    dialogue = data.draw(dialogues(name))
    number = 0
    for row in rows_of(program(name), dialogue):
        before: list[int] = []
        for prompt, answer in row:
            before += prompt
            messages = plain(dialogue, 2 * number + 1)
            assert before == served(name, messages, add_generation_prompt=True, enable_thinking=True)
            before += answer
            number += 1
    assert number == len(dialogue.messages) // 2


@pytest.mark.parametrize("name", PROGRAMS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_labels_cover_exactly_the_answers(name, data):
    dialogue = data.draw(dialogues(name))
    way = program(name)
    asked = iter(way.asked(dialogue))
    for row in rows_of(way, dialogue):
        encoded = label_turns(row, cutoff_len=None)
        assert all(
            label in (IGNORE_INDEX, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True)
        )
        learned = TOKENIZERS[name].decode([label for label in encoded.labels if label != IGNORE_INDEX])
        *earlier, last = [next(asked).answer for _ in row]
        # Where only the last answer has an empty thought, earlier ones are learned as they stand in the history.
        assert learned in ("".join([*earlier, last]), "".join(map(without_empty_thought, earlier)) + last)


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "open end"])
def test_the_end_of_every_answer_is_learned_and_known_as_a_stop(name):
    tokenizer = TOKENIZERS[name]
    end = ENDS.get(name, tokenizer.eos_token)
    for row in rows_of(program(name), talk("a", "b", "c", "d")):
        for _, answer in row:
            assert tokenizer.convert_tokens_to_ids(end) in answer[-2:]
    assert (template_from_slots(tokenizer).stop_words or (tokenizer.eos_token,)) == (end,)


def test_rows_are_split_only_where_history_is_rewritten():
    thoughts = talk("q1", "<think>\nt1\n</think>\n\na1", "q2", "<think>\nt2\n</think>\n\na2")
    first, second = rows_of(program("qwen3"), thoughts)
    decode = TOKENIZERS["qwen3"].decode
    assert decode(first[0][1]) == "<think>\nt1\n</think>\n\na1<|im_end|>\n"
    assert decode(second[0][0]).count("think") == 0  # the earlier thought is dropped
    assert decode(second[0][1]) == "<think>\nt2\n</think>\n\na2<|im_end|>\n"
    assert len(rows_of(program("chatml"), thoughts)) == 1


def test_calls_and_their_answer_share_a_row_where_history_stays():
    messages = (
        Message("user", "Rain?"),
        Message("function", f"<think>\nI look.\n</think>\n\n{CALL}"),
        Message("observation", "no"),
        Message("assistant", "<think>\nDry.\n</think>\n\nNo."),
        Message("user", "Thanks"),
        Message("assistant", "Welcome"),
    )
    first, second = rows_of(program("qwen3"), Dialogue(messages, tools=json.dumps([WEATHER])))
    assert [len(first), len(second)] == [2, 1]
    call = TOKENIZERS["qwen3"].decode(first[0][1])
    assert call == (
        '<think>\nI look.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": [1, 2]}}'
        "\n</tool_call><|im_end|>\n"
    )


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen3"])
def test_tools_and_calls_reach_the_program_as_openai_has_them(name):
    call = ToolCall("weather", {"city": "Rome", "days": [1, 2]}, "abcdefgh1")
    messages = (Message("user", "Rain?"), Message("function", "", calls=(call,)))
    dialogue = Dialogue(messages, tools=json.dumps([WEATHER]))
    ((turn,),) = rows_of(program(name), dialogue)
    function = {"name": "weather", "arguments": {"city": "Rome", "days": [1, 2]}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "abcdefgh1", "type": "function", "function": function}],
        },
    ]
    tools = [{"type": "function", "function": WEATHER}]
    assert turn[0] + turn[1] == served(name, messages, tools=tools)
    assert turn[0] == served(name, messages[:1], tools=tools, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen3"])
def test_the_syntax_that_reads_the_programs_calls_is_found(name):
    way, template = program(name), template_from_slots(TOKENIZERS[name])
    given = ToolCall("weather", {"city": "Rome", "days": [1, 2]}, "abcdefgh1")
    messages = (Message("user", "Rain?"), Message("function", "", calls=(given,)))
    (asked,) = way.asked(Dialogue(messages, tools=json.dumps([WEATHER])))
    answer = asked.answer.partition(ENDS.get(name, "</s>"))[0]
    (call,) = TOOL_SYNTAXES.get(template.call_syntax).parse(answer, [WEATHER])
    assert (call.name, call.arguments) == ("weather", {"city": "Rome", "days": [1, 2]})


def test_without_calls_in_the_program_no_syntax_is_found():
    assert template_from_slots(TOKENIZERS["chatml"]).call_syntax == "default"


@pytest.mark.parametrize(
    ("name", "dialogue", "reason"),
    [
        ("gemma", talk("a", "b", system="s"), "System role not supported"),
        ("chatml", Dialogue((Message("user", "?"), Message("function", CALL))), "does not write the call of 'weather'"),
        ("chatml", Dialogue(talk("a", "b").messages, tools=json.dumps([WEATHER])), "does not render tools"),
        ("qwen3", Dialogue(talk("a", "b").messages, tools="{"), "not JSON"),
        ("qwen3", Dialogue(talk("a", "b").messages, tools="{}"), "not a list of objects"),
        *(("qwen3", Dialogue(talk("a", "b").messages, tools=deep_tools(n)), "more than 100 levels") for n in DEPTHS),
        ("qwen3", Dialogue(talk("a", "b").messages, tools='[{"type": "function"}]'), "holds no function"),
        (
            "qwen3",
            Dialogue((Message("user", "?"), Message("function", "no call"))),
            "^a function message is not JSON of a call",
        ),
    ],
)
def test_what_cannot_be_written_is_a_reason_to_drop_the_row(name, dialogue, reason):
    with pytest.raises(RowError, match=reason):
        program(name).rows(dialogue)


@pytest.mark.parametrize(
    ("enable_thinking", "answer", "prompt_end", "learned"),
    [
        (True, "<think>\nt\n</think>\n\na", "assistant\n", "<think>\nt\n</think>\n\na<|im_end|>\n"),
        (True, "a", "assistant\n", "<think>\n\n</think>\n\na<|im_end|>\n"),
        (None, "<think>\nt\n</think>\n\na", "assistant\n", "<think>\nt\n</think>\n\na<|im_end|>\n"),
        (None, "a", "<think>\n\n</think>\n\n", "a<|im_end|>\n"),
        (False, "<think>\nt\n</think>\n\na", "<think>\n\n</think>\n\n", "a<|im_end|>\n"),
        (False, "a", "<think>\n\n</think>\n\n", "a<|im_end|>\n"),
    ],
)
def test_thinking(enable_thinking, answer, prompt_end, learned):
    ((turn,),) = rows_of(program("qwen3", enable_thinking=enable_thinking), talk("q", answer))
    decode = TOKENIZERS["qwen3"].decode
    assert decode(turn[0]).endswith(prompt_end)
    assert decode(turn[1]) == learned


@pytest.mark.parametrize(
    ("answer", "learned"),
    [("<think>\nt\n</think>\n\na", "t\n</think>\n\na</s>"), ("a", "\n</think>\n\na</s>")],
)
def test_a_thought_that_the_prompt_opens_is_gone_on_with(answer, learned):
    ((turn,),) = rows_of(program("r1"), talk("q", answer))
    decode = TOKENIZERS["r1"].decode
    assert decode(turn[0]) == "<s><|User|>q<|Assistant|><think>\n"
    assert decode(turn[1]) == learned


def test_the_default_system_text_of_the_run_takes_the_place_of_the_programs():
    ((turn,),) = rows_of(program("chatml", default_system="Be brief."), talk("a", "b"))
    assert turn[0] == served("chatml", plain(talk("a", "b", system="Be brief."))[:2], add_generation_prompt=True)


def test_a_system_text_that_only_a_waiting_question_has_is_kept_before_its_answer():
    first, second = rows_of(program("last question"), talk("q1", "a1", "q2", "a2", system="S"))
    decode = TOKENIZERS["last question"].decode
    assert [decode(part) for part in first[0]] == ["<s>[INST] S\n\nq1[/INST]", " a1</s>"]
    assert [decode(part) for part in second[0]] == ["<s>[INST] q1[/INST] a1</s>[INST] S\n\nq2[/INST]", " a2</s>"]


def test_where_nothing_ends_an_answer_the_eos_is_learned():
    """At the end of the row, and in place of the first token of the next question."""
    tokenizer = TOKENIZERS["open end"]
    way = program("open end")
    encoding = Encoding(way.encoder, template_from_slots(tokenizer), None, model_template=way)
    assert encoding.closing_eos == tokenizer.eos_token_id
    (row,) = rows_of(way, talk("q", "a", "r", "b"))
    encoded = label_turns(row, cutoff_len=None, eos_token_id=encoding.closing_eos)
    assert tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX]) == "a</s>b</s>"
    assert tokenizer.decode(encoded.input_ids) == "[user]q[assistant]a[user]r[assistant]b</s>"


def test_words_that_the_program_does_not_write_are_a_reason_to_drop_the_row():
    tokenizer = tokenizer_with("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.text }}{% endfor %}"
    with pytest.raises(RowError, match="does not write the text of an answer"):
        ModelChatTemplate(Encoder(tokenizer)).rows(talk("q", "an answer"))


@pytest.mark.parametrize("system", [None, "s"])
def test_a_program_that_takes_lists_of_parts_gets_them(system):
    """As in templates for pictures, which take contents apart into pictures and texts."""
    tokenizer = tokenizer_with("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (row,) = ModelChatTemplate(Encoder(tokenizer)).rows(talk("q", "an answer", "r", "another", system=system))
    assert row.text == ("system:s;" if system else "") + "user:q;assistant:an answer;user:r;assistant:another;"


def merging_tokenizer(chat_template: str):
    """Two newlines are one token; every other byte is one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "ĊĊ"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=chat_template)


def test_no_token_spans_the_end_of_a_prompt():
    """A server sends the prompt alone, and the model continues its tokens."""
    template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant\n{% endif %}"
    tokenizer = merging_tokenizer(template)
    ((turn,),) = rows_of(ModelChatTemplate(Encoder(tokenizer)), talk("q", "\na"))
    asked = plain(talk("q", "\na"))[:1]
    sent = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert turn[0] == sent
    assert tokenizer.decode(turn[1]) == "\na</s>"


def test_offsets_that_a_post_processor_has_trimmed_do_not_move_the_border():
    """ByteLevel(trim_offsets) leaves blanks out of the offsets of `\\n\\n`, which spans the border all the same."""
    from tokenizers import processors

    template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = merging_tokenizer(template + "{% if add_generation_prompt %}assistant\n{% endif %}")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    ((turn,),) = rows_of(ModelChatTemplate(Encoder(tokenizer)), talk("q", "\na"))
    assert [tokenizer.decode(part) for part in turn] == ["user\nq</s>assistant\n", "\na</s>"]


def slow_tokenizer(name: str):
    """A tokenizer written in Python: one token per character, and `<|im_start|>` and `<|im_end|>`."""
    from transformers import PreTrainedTokenizer

    class Characters(PreTrainedTokenizer):
        @property
        def vocab_size(self) -> int:
            return 0x3000

        def get_vocab(self):
            return {chr(i): i for i in range(256)} | self.added_tokens_encoder

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return ord(token)

        def _convert_id_to_token(self, index):
            return chr(index)

    tokenizer = Characters(eos_token="</s>", additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = PROGRAMS[name]
    return tokenizer


def test_a_tokenizer_without_offsets_gets_prompts_and_answers_apart():
    tokenizer = slow_tokenizer("chatml")
    assert not tokenizer.is_fast
    (row,) = rows_of(ModelChatTemplate(Encoder(tokenizer)), talk("a", "b", "c", "d"))
    asked = ModelChatTemplate(Encoder(tokenizer)).asked(talk("a", "b", "c", "d"))
    assert [turn[1] for turn in row] == [tokenizer.encode(one.answer, add_special_tokens=False) for one in asked]
    assert row[0][0] == tokenizer.encode(asked[0].prompt, add_special_tokens=False)


def test_for_generation_the_prompt_is_what_a_server_sends():
    encoding = Encoding(
        Encoder(TOKENIZERS["qwen3"]), template_from_slots(TOKENIZERS["qwen3"]), None, model_template=program("qwen3")
    )
    dialogue = talk("q1", "<think>\nt\n</think>\n\na1", "q2", "a2")
    (encoded,) = encode_last_turns([dialogue], encoding)
    assert encoded.input_ids == served("qwen3", plain(dialogue, 3), add_generation_prompt=True)
    assert TOKENIZERS["qwen3"].decode(encoded.labels) == "<think>\n\n</think>\n\na2<|im_end|>\n"


@pytest.fixture(scope="module")
def qwen3_folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("qwen3"), tokenizer=tokenizer_with("qwen3"))


@pytest.fixture
def run(tmp_path, qwen3_folder):
    """The data of a run over conversations; each is a list of contents."""

    def prepared(conversations: list[list[str]], **changes: Any):
        roles = ("human", "gpt")
        rows = [
            {"conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(contents)]}
            for contents in conversations
        ]
        (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        info = {"rows": {"file_name": "rows.json", "formatting": "sharegpt"}}
        (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        values = {"model_name_or_path": str(qwen3_folder), "dataset_dir": str(tmp_path), "dataset": "rows"}
        run = load_train({**values, "template": "auto", "output_dir": str(tmp_path / "out"), **changes})
        return prepare(run, STAGES.get(run.stage).rows, load_text_side(run).encoding)

    return prepared


TWO_TURNS = ["q1", "a1", "q2", "a2"]


def learned(data: Any) -> list[str]:
    decode = TOKENIZERS["qwen3"].decode
    return [decode([label for label in labels if label != IGNORE_INDEX]) for labels in data.train["labels"]]


EMPTY = "<think>\n\n</think>\n\n"


THOUGHTS = ["q1", "<think>\nt1\n</think>\n\na1", "q2", "<think>\nt2\n</think>\n\na2"]


def test_split_conversations_are_counted_and_said_once(run):
    data = run([THOUGHTS, ["q", "a"], THOUGHTS])
    split = [f"<think>\nt{number}\n</think>\n\na{number}<|im_end|>\n" for number in (1, 2)]
    assert learned(data) == [*split, f"{EMPTY}a<|im_end|>\n", *split]
    account = data.ledger.accounts["rows"]
    assert (account.rows_in, account.kept, account.rewritten, account.rewritten_into) == (3, 3, 2, 4)
    split_rows = [place for place, text in enumerate(learned(data)) if "<think>\nt" in text]
    num_tokens = sum(len(data.train["input_ids"][place]) for place in split_rows)
    num_learned = sum(len(TOKENIZERS["qwen3"].encode(learned(data)[place])) for place in split_rows)
    assert (account.rewritten_tokens, account.rewritten_labeled_tokens) == (num_tokens, num_learned)
    cost = f"2 conversations became 4 rows ({num_tokens} tokens, {num_learned} of them learned)"
    (line,) = [line for line in data.ledger.summary() if cost in line]
    assert "chat template" in line and "mask_history: true" in line


def test_without_thoughts_a_conversation_is_one_row(run):
    """Only the last answer has an empty thought, so the row is the rendering of the whole conversation."""
    data = run([TWO_TURNS * 20])
    (ids,) = data.train["input_ids"]
    assert list(ids) == served("qwen3", plain(talk(*TWO_TURNS * 20)))
    assert learned(data) == ["a1<|im_end|>\na2<|im_end|>\n" * 19 + f"a1<|im_end|>\n{EMPTY}a2<|im_end|>\n"]
    assert data.ledger.accounts["rows"].rewritten == 0


def test_only_answers_with_thoughts_need_rows_of_their_own(run):
    """Where the second of five has one, answers one and two share a row, and so do the other three."""
    data = run([["q1", "a1", *THOUGHTS[2:], "q3", "a3", "q4", "a4", "q5", "a5"]])
    assert learned(data) == [
        "a1<|im_end|>\n<think>\nt2\n</think>\n\na2<|im_end|>\n",
        f"a3<|im_end|>\na4<|im_end|>\n{EMPTY}a5<|im_end|>\n",
    ]


def test_with_mask_history_an_earlier_answer_that_cannot_be_written_does_no_harm():
    """Only an answer that is learned needs the id of its call."""
    messages = (
        Message("user", "Rain?"),
        Message("function", CALL),
        Message("observation", "no"),
        Message("assistant", "No."),
    )
    dialogue, way = Dialogue(messages, tools=json.dumps([WEATHER])), program("mistral")
    with pytest.raises(RowError, match="the data give none"):
        way.rows(dialogue)
    (row,) = way.rows(dialogue, only_last=True)
    assert row == way.last_row(dialogue)


LONG = talk(*[text for number in range(30) for text in (f"q{number}", f"a{number} ")], "q", "a", system="S")


@pytest.fixture
def runs(monkeypatch):
    """Counts what the template renders, in messages."""
    import luthier.data.chat.model_template as module

    rendered: list[int] = []
    real = module.run

    def counting(tokenizer, messages, *rest, **options):
        rendered.append(len(messages))
        return real(tokenizer, messages, *rest, **options)

    monkeypatch.setattr(module, "run", counting)
    return rendered


@pytest.mark.parametrize("name", KEEPS_HISTORY)
def test_a_long_conversation_takes_few_renderings(name, runs, monkeypatch):
    import luthier.data.chat.model_template as module

    dialogue = replace(LONG, system=None) if name == "gemma" else LONG
    rows, num_messages = program(name).rows(dialogue), sum(runs)
    assert num_messages < 20 * len(dialogue.messages)
    monkeypatch.setattr(module, "_MANY_MESSAGES", 1000)
    runs.clear()
    assert program(name).rows(dialogue) == rows
    assert sum(runs) > 2 * num_messages


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role ~ loop.index ~ m.content }}</s>{% endfor %}",
        "{% for m in messages[-5:] %}{{ m.role ~ m.content }}</s>{% endfor %}",
        "{% for m in messages %}{{ m.role ~ m.content }}</s>{% if loop.index == 20 %}[reminder]{% endif %}{% endfor %}",
        "{{ messages | length }}{% for m in messages %}{{ m.role ~ m.content }}</s>{% endfor %}",
    ],
)
def test_a_template_that_counts_messages_is_rendered_answer_by_answer(template, monkeypatch):
    import luthier.data.chat.model_template as module

    tokenizer = merging_tokenizer(template + "{% if add_generation_prompt %}assistant{% endif %}")
    rows = ModelChatTemplate(Encoder(tokenizer)).rows(replace(LONG, system=None))
    monkeypatch.setattr(module, "_MANY_MESSAGES", 1000)
    assert rows == ModelChatTemplate(Encoder(tokenizer)).rows(replace(LONG, system=None))


def test_mask_history_keeps_the_row_of_the_last_answer(run):
    assert learned(run([TWO_TURNS], mask_history=True)) == [f"{EMPTY}a2<|im_end|>\n"]


def test_train_on_prompt_learns_all_of_every_row(run):
    data = run([THOUGHTS], train_on_prompt=True)
    assert data.train["labels"] == data.train["input_ids"]
    assert len(data.train) == 2


def test_what_is_cut_follows_the_budget_of_prompts_and_answers(run):
    """The answer is longer than half of 60 tokens, the prompt of 29 is not: it is kept, and 31 tokens of the answer."""
    data = run([["q" * 10, "a" * 100]], cutoff_len=60)
    (ids,), (labels,) = data.train["input_ids"], data.train["labels"]
    num_prompt = len(served("qwen3", [{"role": "user", "content": "q" * 10}], add_generation_prompt=True))
    assert num_prompt == 29 and len(ids) == 60
    assert labels == [IGNORE_INDEX] * num_prompt + ids[num_prompt:]
    account = data.ledger.accounts["rows"]
    assert (account.truncated, account.lost_terminators) == (1, 1)


def test_rows_that_the_program_refuses_are_dropped_with_its_reason(run, tmp_path, qwen3_folder):
    folder = tiny_llama(tmp_path / "gemma", tokenizer=tokenizer_with("gemma"))
    with pytest.raises(
        DataError, match="the model's own chat template refuses the conversation: System role not supported"
    ):
        run([["q", "a"]], model_name_or_path=str(folder), default_system="Be brief.")


def test_a_tokenizer_without_offsets_is_said_once(said, monkeypatch, qwen3_folder, tmp_path):
    import luthier.model.tokenizer

    monkeypatch.setattr(luthier.model.tokenizer, "load_tokenizer", lambda *_, **__: slow_tokenizer("chatml"))
    run = load_train({"model_name_or_path": str(qwen3_folder), "dataset": "x", "output_dir": str(tmp_path)})
    load_text_side(run)
    assert sum("does not tell where tokens begin" in line for line in said) == 1


@pytest.mark.parametrize(("comment", "num_prompts"), [("", 1), ("{# strftime_now #}", 3)])
def test_a_prompt_that_many_rows_have_is_rendered_once(comment, num_prompts, runs):
    tokenizer = tokenizer_with("chatml")
    tokenizer.chat_template += comment
    own = ModelChatTemplate(Encoder(tokenizer))
    rows = [own.rows(talk("Transcribe this.", answer)) for answer in ("One.", "Two.", "Three.")]
    assert (runs.count(1), runs.count(2)) == (num_prompts, 3)
    assert rows == [program("chatml").rows(talk("Transcribe this.", answer)) for answer in ("One.", "Two.", "Three.")]
    runs.clear()
    tokenizer.chat_template = TOKENIZERS["gemma"].chat_template
    assert own.rows(talk("Transcribe this.", "One.")) != rows[0] and len(runs) == 2, "another template"
