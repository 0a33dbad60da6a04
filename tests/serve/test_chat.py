"""Chat over HTTP, with OpenAI's own clients and with plain bytes. The model is scripted, the server is real."""

import asyncio
import json
import threading

import httpx
import openai
import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from luthier.core.errors import InvalidInput, RunFailed
from luthier.infer.engines.huggingface import HuggingFaceModel
from tests.serve.fakes import CALL, WEATHER, chat_model, last_question, serving
from tests.serve.process import leaving
from tests.tiny import byte_tokenizer, tiny_llama
from tests.waiting import until

HI = [{"role": "user", "content": "hi"}]
PATH = "/v1/chat/completions"
GATE = threading.Event()
SCRIPTS = {
    "hi": ["Hel", "lo."],
    "long": ["one ", "two ", "three", "..."],
    "think": ["<think>\nhm", "\n</think>\n\nYes."],
    "call": ["Let me see. <tool_", CALL.removeprefix("<tool_"), "\n" + CALL],
    "fail": ["some", RunFailed("out of memory")],
    "bug": ["some", KeyError("inner")],
    "cut call": [CALL, "And", "..."],
    "half": [CALL.replace("Łódź", "\\ud800")],
    "wait": ["first", GATE, "last"],
    "€": ["a", "€", "\u2028b"],
}


@pytest.fixture(scope="module")
def server():
    model = chat_model(lambda prompt: SCRIPTS.get(last_question(prompt), [last_question(prompt)]), template="qwen3")
    with serving(model) as (url, service):
        yield url, service, model.engine


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client, text, **fields):
    return client.chat.completions.create(model="any", messages=[{"role": "user", "content": text}], **fields)


def post(server, **fields):
    return httpx.post(f"{server[0]}{PATH}", json={"messages": HI, **fields}, timeout=60)


def data_lines(response) -> list:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_an_answer(client):
    answer = ask(client, "hi")
    assert answer.object == "chat.completion" and answer.model == "tiny" and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello.", "stop")
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6
    assert answer._request_id.startswith("req_")


def test_an_answer_that_is_cut_off(client):
    assert ask(client, "long").choices[0].finish_reason == "length"


def test_thoughts_are_apart(client):
    message = ask(client, "think").choices[0].message
    assert (message.content, message.reasoning_content) == ("Yes.", "hm")


def test_the_chunks_of_a_stream(server):
    response = post(server, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, end = data_lines(response)
    assert end == "[DONE]"
    heads = [{key: chunk[key] for key in ("id", "object", "created", "model")} for chunk in chunks]
    assert all(head == heads[0] for head in heads) and heads[0]["object"] == "chat.completion.chunk"
    choices = [chunk["choices"] for chunk in chunks]
    assert choices[0][0]["delta"] == {"role": "assistant", "content": ""}
    assert [one[0]["delta"] for one in choices[1:3]] == [{"content": "Hel"}, {"content": "lo."}]
    assert choices[3][0]["delta"] == {} and choices[3][0]["finish_reason"] == "stop"
    assert all(one[0]["finish_reason"] is None for one in choices[:3])
    assert choices[4] == [] and chunks[4]["usage"]["completion_tokens"] == 6
    assert all(chunk["usage"] is None for chunk in chunks[:4])
    assert "usage" not in data_lines(post(server, stream=True))[0]


def test_a_stream_has_the_same_parts_as_the_whole(client):
    for text in SCRIPTS.keys() - {
        "fail",
        "bug",
        "wait",
        "long",
        "cut call",
    }:  # the helper refuses an answer that was cut off
        whole = ask(client, text, tools=[WEATHER]).choices[0]
        with client.chat.completions.stream(
            model="x", messages=[{"role": "user", "content": text}], tools=[WEATHER]
        ) as stream:
            streamed = stream.get_final_completion().choices[0]
        assert (streamed.message.content or None) == (whole.message.content or None)
        assert streamed.finish_reason == whole.finish_reason
        calls = [[call.function.arguments for call in one.message.tool_calls or ()] for one in (whole, streamed)]
        assert calls[0] == calls[1]


def test_calls(client):
    (choice,) = ask(client, "call", tools=[WEATHER]).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    first, second = choice.message.tool_calls
    assert first.type == "function" and first.id != second.id and first.id
    assert first.function.name == "weather" and json.loads(first.function.arguments) == {"city": "Łódź"}


def test_a_call_that_cannot_be_encoded_is_text(client):
    message = ask(client, "half", tools=[WEATHER]).choices[0].message
    assert message.tool_calls is None and message.content == CALL.replace("Łódź", "\\ud800")


def test_calls_stream(server):
    chunks = data_lines(post(server, messages=[{"role": "user", "content": "call"}], tools=[WEATHER], stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert [delta.get("content") for delta in deltas[:2]] == ["", "Let me see."]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1]
    assert all(set(call) == {"index", "id", "type", "function"} for call in calls)
    assert not any("tool_call>" in (delta.get("content") or "") for delta in deltas)
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_off_after_a_call_ends_with_length(server, stream):
    response = post(server, messages=[{"role": "user", "content": "cut call"}], tools=[WEATHER], stream=stream)
    assert response.text.count('"weather"') == 1
    assert '"finish_reason":"length"' in response.text and '"finish_reason":"tool_calls"' not in response.text


def test_the_tokens_up_to_the_only_call_are_counted(server):
    """The same in a stream and without one: those that came before the answer was ended."""
    fields = {"messages": [{"role": "user", "content": "call"}], "tools": [WEATHER], "parallel_tool_calls": False}
    whole = post(server, **fields).json()["usage"]
    chunks = data_lines(post(server, stream=True, stream_options={"include_usage": True}, **fields))
    num_tokens = len(server[2].tokenizer.encode("".join(SCRIPTS["call"][:2]), add_special_tokens=False))
    assert chunks[-2]["usage"] == whole and whole["completion_tokens"] == num_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_only(server, stream):
    fields = {"messages": [{"role": "user", "content": "call"}], "tools": [WEATHER], "parallel_tool_calls": False}
    response = post(server, stream=stream, **fields)
    assert response.text.count('"weather"') == 1
    assert '"finish_reason":"tool_calls"' in response.text


def test_without_tools_a_call_is_text(client):
    assert CALL in ask(client, "call").choices[0].message.content
    assert ask(client, "call", tools=[WEATHER], tool_choice="none").choices[0].message.tool_calls is None


def test_a_conversation_with_tools_goes_on(client, server):
    """As in the reference's own example: the answer is sent back as it came, and the result has no id."""
    messages = [{"role": "user", "content": "call"}]
    message = client.chat.completions.create(model="test", messages=messages, tools=[WEATHER]).choices[0].message
    messages.append(message)
    messages += [{"role": "tool", "content": "rain"}, {"role": "tool", "content": "sun"}]
    client.chat.completions.create(model="test", messages=messages, tools=[WEATHER])
    assert "rain" in server[2].prompts[-1] and "sun" in server[2].prompts[-1]


def test_several_choices(client, server):
    answer = ask(client, "hi", n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [settings.seed for settings in server[2].settings[-3:]] == [7, 8, 9]
    assert answer.usage.completion_tokens == 18
    indexes = [chunk.choices[0].index for chunk in ask(client, "hi", n=3, stream=True)]
    assert sorted(set(indexes)) == [0, 1, 2] and len(indexes) == 12


def test_logprobs(client, server):
    answer = ask(client, "€", logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == "a€\u2028b"
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in content)
    streamed = list(ask(client, "€", logprobs=True, stream=True))
    entries = [entry for chunk in streamed if (found := chunk.choices[0].logprobs) for entry in found.content]
    assert [entry.token for entry in entries] == [entry.token for entry in content]


def test_token_ids(server):
    body = post(server, return_token_ids=True).json()
    tokenizer = server[2].tokenizer
    assert tokenizer.decode(body["prompt_token_ids"]) == server[2].prompts[-1]
    assert tokenizer.decode(body["choices"][0]["token_ids"]) == "Hello."
    chunks = data_lines(post(server, return_token_ids=True, stream=True))[:-1]
    assert chunks[0]["prompt_token_ids"] == body["prompt_token_ids"]
    streamed = [token_id for chunk in chunks for token_id in chunk["choices"][0].get("token_ids", [])]
    assert streamed == body["choices"][0]["token_ids"]


def test_unknown_fields_are_named(client):
    raw = client.chat.completions.with_raw_response.create(model="x", messages=HI, user="me", extra_body={"foo": 1})
    assert raw.headers["x-luthier-ignored"] == "foo,user"
    assert raw.parse().choices[0].message.content == "Hello."


def test_an_error_before_the_first_byte_is_an_error_of_its_class(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "hi", temperature=-1)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(("text", "says"), [("fail", "out of memory"), ("bug", "the server failed")])
def test_an_error_in_a_stream_is_an_event_without_an_end_mark(server, client, text, says):
    response = post(server, messages=[{"role": "user", "content": text}], stream=True)
    assert response.status_code == 200 and "[DONE]" not in response.text
    assert says in data_lines(response)[-1]["error"]["message"] and "inner" not in response.text
    with pytest.raises(openai.APIError, match=says):
        list(ask(client, text, stream=True))
    with pytest.raises(openai.InternalServerError, match=says):
        ask(client, text)


def test_what_the_engine_refuses_is_the_fault_of_the_request(server):
    model = chat_model()

    def refuse(prompt_ids, settings, deliver):
        raise InvalidInput("no room for an answer: the prompt has 9 tokens")

    model.engine.submit = refuse
    with serving(model) as (url, service):
        response = httpx.post(f"{url}{PATH}", json={"messages": HI, "n": 2}, timeout=60)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert service.admission.num_answers == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_when_its_client_leaves(server, stream):
    url, service, engine = server
    GATE.clear()
    with leaving(f"{url}{PATH}", {"messages": [{"role": "user", "content": "wait"}], "stream": stream, "n": 2}):
        until(lambda: service.admission.num_answers == 2)
    until(lambda: service.admission.num_answers == 0)
    assert all(ticket.canceled.is_set() for ticket in engine.tickets[-2:])
    GATE.set()


def test_the_asynchronous_client(server):
    async def talk():
        async with openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(*(ask(client, f"echo {k}") for k in range(20)))
            stream = await ask(client, "hi", stream=True)
            return answers, [chunk async for chunk in stream]

    answers, chunks = asyncio.run(talk())
    assert [answer.choices[0].message.content for answer in answers] == [f"echo {k}" for k in range(20)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello."


def test_thinking_can_be_switched_off(server):
    post(server)
    assert "<think>" not in server[2].prompts[-1]
    post(server, chat_template_kwargs={"enable_thinking": False})
    assert server[2].prompts[-1].endswith("<think>\n\n</think>\n\n")


def test_a_grammar_holds_from_the_first_token_so_the_thought_is_empty(server):
    post(server, response_format={"type": "json_object"})
    assert server[2].prompts[-1].endswith("</think>\n\n")
    assert server[2].settings[-1].grammar is not None


def test_an_answer_is_continued(server):
    messages = [*HI, {"role": "assistant", "content": "Once upon"}]
    assert post(server, messages=messages, continue_final_message=True).status_code == 200
    assert server[2].prompts[-1].endswith("assistant\nOnce upon")


def test_tags_that_are_special_tokens_are_read_and_not_shown():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool_call|>", "<|/tool_call|>"]})
    said = ["Well<|im_start|>.<|tool_", 'call|>[{"name": "weather", "arguments": {"city": "Oslo"}}]<|/tool_call|>']
    model = chat_model(lambda prompt: said, template="phi4_mini", tokenizer=tokenizer, call_syntax="phi4_mini")
    with serving(model) as (url, _):
        for fields, skips in (({"tools": [WEATHER]}, False), ({}, True)):
            response = httpx.post(f"{url}{PATH}", json={"messages": HI, **fields}, timeout=60)
            message = response.json()["choices"][0]["message"]
            assert model.engine.settings[-1].skip_special_tokens is skips
            if fields:
                assert message["content"] == "Well."
                assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'


class SlowTokenizer(PreTrainedTokenizerFast):
    """Grammars need a fast one, which is found out when decoding begins."""

    is_fast = False


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice"),
    ],
)
def test_a_fault_of_the_grammar_while_decoding_is_the_field_that_asked_for_it(tmp_path, fields, param):
    folder = tiny_llama(tmp_path / "model", max_position_embeddings=4096)
    engine = HuggingFaceModel(
        AutoModelForCausalLM.from_pretrained(folder), SlowTokenizer.from_pretrained(folder), {260}
    )
    with serving(chat_model(engine=engine)) as (url, _):
        whole = httpx.post(f"{url}{PATH}", json={"messages": HI, **fields}, timeout=60)
        stream = httpx.post(f"{url}{PATH}", json={"messages": HI, "stream": True, **fields}, timeout=60)
    error = whole.json()["error"]
    assert (whole.status_code, error["param"]) == (400, param) and "fast tokenizer" in error["message"]
    assert stream.status_code == 200 and data_lines(stream)[-1] == {"error": error}
    assert "event: error\n" in stream.text and "[DONE]" not in stream.text


@pytest.mark.parametrize(("path", "asked"), [(PATH, {"messages": HI}), ("/v1/completions", {"prompt": "hi"})])
def test_a_stop_text_that_is_a_special_token_ends_the_answer_as_a_token(server, path, asked):
    """Its text is left out of the answer, so it is never found there."""
    url, _, engine = server
    body = {**asked, "stop": ["<|endoftext|>", "x"], "stop_token_ids": [7]}
    assert httpx.post(f"{url}{path}", json=body, timeout=60).status_code == 200
    assert engine.settings[-1].stop_token_ids == (7, 256)
