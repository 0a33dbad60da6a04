"""A chat template may fail in any way: there is always one sentence, never a traceback."""

import builtins
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.cli import main
from luthier.core.errors import RowError
from luthier.data.chat import program
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.chat.program import run, source
from luthier.data.chat.template_slots import template_from_slots
from luthier.data.types import Dialogue, Message
from luthier.inspection.server import Server
from tests.trait_programs import merging_tokenizer

TALK = Dialogue((Message("user", "q"), Message("assistant", "a")))
FAILING = {
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{{ 1.0 / 0 }}": "ZeroDivisionError",
    "{{ 10.0 ** 400 }}": "OverflowError",
    "{{ range(10 ** 9) | list }}": "OverflowError",
    "{{ messages[99].content }}": "has no element 99",
    "{{ messages[0].absent + 'x' }}": "has no attribute 'absent'",
    "{{ dict(a=1).popitem() }}": "not safe|popitem",
    "{{ 'abc'.index('x') }}": "ValueError",
    "{{ '{k}'.format(a=1) }}": "KeyError",
    "{{ '{9}'.format(1) }}": "IndexError",
    "{{ 'a'.encode('no such code') }}": "LookupError",
    "{{ '\\ud800'.encode() }}": "UnicodeEncodeError",
    "{{ 'x' + 1 }}": "TypeError",
    "{{ messages[0] | tojson | int + [] }}": "TypeError",
    "{{ messages.absent() }}": "no attribute 'absent'",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
    "{{ ('x' * 10 ** 7) * 10 ** 12 }}": "MemoryError|OverflowError",
    "{{ strftime_now(1) }}": "TypeError",
    "{{ raise_exception('only so') }}": "refuses the conversation: only so",
    "{% if %}": "refuses the conversation",
    "{{ x | no_such_filter }}": "no_such_filter",
    "{% include 'other' %}": "TypeError|no loader",
    "{{ ''.__class__.__mro__ }}": "unsafe|undefined",
    "{{ [3, 'a'] | sort }}": "TypeError",
    "{{ [].pop() }}": "unsafe",
    "{{ (1, 2) | map('no_such') | list }}": "no_such",
    "{{ '%d' % 'x' }}": "TypeError",
}


@pytest.mark.parametrize("template", FAILING)
def test_whatever_stops_a_template_is_one_reason(template):
    tokenizer = merging_tokenizer(template)
    with pytest.raises(RowError, match=FAILING[template]) as caught:
        run(tokenizer, [{"role": "user", "content": "q"}], asks=True, switches={})
    assert "the model's own chat template" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("template", FAILING)
def test_no_user_of_a_template_sees_another_error(template):
    tokenizer = merging_tokenizer(template)
    assert template_from_slots(tokenizer).kind == "program"
    for ask in (ModelChatTemplate(Encoder(tokenizer)).rows, Server(tokenizer).asked):
        with pytest.raises(RowError):
            ask(TALK)


def plain_errors() -> list[type[Exception]]:
    """Every builtin error but those of files, processes and the interpreter itself."""
    kinds = [kind for kind in vars(builtins).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    outside = (OSError, EOFError, BufferError, SystemError, Warning, ExceptionGroup, StopAsyncIteration, ReferenceError)
    return [kind for kind in kinds if kind is not Exception and not issubclass(kind, outside)]


@pytest.mark.parametrize("kind", plain_errors(), ids=lambda kind: kind.__name__)
def test_each_builtin_error_is_expected(kind, monkeypatch):
    unicode_faults = {
        UnicodeDecodeError: ("utf-8", b"x", 0, 1, "bad"),
        UnicodeEncodeError: ("utf-8", "x", 0, 1, "bad"),
        UnicodeTranslateError: ("x", 0, 1, "bad"),
    }

    def fail(*_, **__):
        raise kind(*unicode_faults.get(kind, ("a reason\nof two lines",)))

    tokenizer = merging_tokenizer("x")
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", fail)
    with pytest.raises(RowError, match=kind.__name__):
        run(tokenizer, [], asks=True, switches={})


EXPRESSIONS = st.recursive(
    st.sampled_from(["messages", "messages[0]", "messages[0].content", "1", "0", "'x'", "none", "tools", "x", "1.5"]),
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "//", "/", "%", "~", "in", "<"]), inner)
        | st.builds("{}[{}]".format, inner, inner)
        | st.builds(
            "({} | {})".format,
            inner,
            st.sampled_from(["int", "list", "join", "sort", "tojson", "first", "items", "length", "sum", "batch(0)"]),
        )
        | st.builds(
            "({}.{})".format, inner, st.sampled_from(["split()", "format()", "items()", "a.b", "index(1)", "encode()"])
        )
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(EXPRESSIONS)
def test_any_expression_renders_or_is_one_reason(expression):
    tokenizer = merging_tokenizer("{{ " + expression + " }}")
    try:
        assert isinstance(run(tokenizer, [{"role": "user", "content": "q"}], asks=True, switches={}), str)
    except RowError as reason:
        assert "the model's own chat template" in str(reason)


@pytest.mark.parametrize(
    ("named", "has_tools", "chosen"),
    [
        ({"default": "D", "tool_use": "T"}, False, "D"),
        ({"default": "D", "tool_use": "T"}, True, "T"),
        ({"default": "D", "rag": "R"}, True, "D"),
        ({"tool_use": "T"}, True, "T"),
    ],
)
def test_named_templates_are_chosen_as_transformers_does(named, has_tools, chosen):
    tokenizer = merging_tokenizer(named)
    tools = [{"type": "function", "function": {"name": "f"}}] if has_tools else None
    assert source(tokenizer, has_tools=has_tools) == chosen == tokenizer.get_chat_template(tools=tools)
    question = [{"role": "user", "content": "q"}]
    assert run(tokenizer, question, tools, asks=False, switches={}) == chosen


@pytest.mark.parametrize("named", [{"tool_use": "T"}, {"rag": "R", "tool_use": "T"}, {"rag": "R"}])
def test_without_a_default_the_names_are_told(named):
    tokenizer = merging_tokenizer(named)
    names = " and one named ".join(sorted(named))
    with pytest.raises(RowError, match=f"a chat template named {names}, but none named default"):
        run(tokenizer, [], asks=True, switches={})


def test_what_a_message_quotes_is_no_part_of_the_kind():
    reasons = [
        RowError(*caught(f"{{{{ raise_exception('unknown role ' ~ \"'{role}'\") }}}}")) for role in ("boss", "guest")
    ]
    assert len({reason.kind for reason in reasons}) == 1


def caught(template: str) -> tuple[str, ...]:
    with pytest.raises(RowError) as error:
        run(merging_tokenizer(template), [], asks=True, switches={})
    return str(error.value), *error.value.quoted


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{{ messages[0]['x']['y'] }}", "{{ '{k}'.format() }}"])
@pytest.mark.parametrize("command", [["data"], ["template", "check"]])
def test_commands_end_with_a_sentence(template, command, tmp_path, capsys):
    merging_tokenizer(template).save_pretrained(tmp_path / "model")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 400}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "q", "output": "a"}]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    keys = {"dataset_dir": str(tmp_path), "dataset": "rows", "output_dir": str(tmp_path / "out"), "template": "auto"}
    values = {"model_name_or_path": str(tmp_path / "model"), "stage": "sft", **keys}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    target = str(tmp_path / ("run.yaml" if command == ["data"] else "model"))
    status = main([*command, target])
    shown = "".join(capsys.readouterr())
    assert "Traceback" not in shown and "chat template" in shown
    assert status == (2 if command == ["data"] else 0)


def test_the_list_of_errors_has_no_doubles():
    kinds = program._FAULTS
    assert not [kind for kind in kinds for other in kinds if kind is not other and issubclass(kind, other)]
