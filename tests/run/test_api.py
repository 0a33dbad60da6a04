"""`luthier api` as a process of its own with a tiny model: what it prints, answers and does when it is stopped."""

import json
import signal
import subprocess
import sys
import threading

import httpx
import openai
import pytest
import torch

from luthier.core.errors import MissingExtra
from luthier.core.ports import free_port
from luthier.evals.scorer import Scorer, encode_pair
from luthier.run import api as command
from tests.serve.process import HELD, READY_SECONDS, Api, api, leaving, wait_for_port
from tests.tiny import tiny_llama
from tests.waiting import until

HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """With room for the description of a tool in bytes."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def keys(llama_folder):
    return {"model_name_or_path": str(llama_folder), "template": "qwen", "max_new_tokens": 16}


@pytest.fixture(scope="module")
def url(keys, tmp_path_factory):
    with api(tmp_path_factory.mktemp("api"), keys, MAX_CONCURRENT="8", API_MODEL_NAME="") as (address, _):
        yield address


@pytest.fixture(scope="module")
def model(llama_folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(llama_folder).eval()


def post(url, path=CHAT, **fields):
    response = httpx.post(f"{url}{path}", json=fields, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def metric(url, name: str) -> int:
    text = httpx.get(f"{url}/metrics", timeout=60).text
    lines = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    return int(lines[f"luthier_{name}"])


def running(url) -> int:
    return metric(url, "requests_running") + metric(url, "requests_waiting")


def test_the_model_is_called_like_its_folder(url, llama_folder):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        assert [one.id for one in client.models.list()] == [llama_folder.name]


def test_answers_are_those_of_the_model(url, model, tokenizer):
    body = post(url, messages=HI, return_token_ids=True, ignore_eos=True, **GREEDY)
    prompt = body["prompt_token_ids"]
    assert tokenizer.decode(prompt).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    plain = model.generate(torch.tensor([prompt]), do_sample=False, min_new_tokens=12, max_new_tokens=12)
    assert body["choices"][0]["token_ids"] == plain[0, len(prompt) :].tolist()
    assert body["choices"][0]["finish_reason"] == "length"


def test_callers_do_not_disturb_each_other(url):
    asks = [{"messages": [{"role": "user", "content": "x" * k}], "seed": k, "temperature": 1.0} for k in range(12)]
    alone = [post(url, **fields)["choices"] for fields in asks]
    together: dict[int, list] = {}

    def ask(number: int) -> None:
        together[number] = post(url, **asks[number])["choices"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(12)] == alone
    assert len({choices[0]["message"]["content"] for choices in alone}) > 6


def test_log_probabilities_are_those_of_the_model(url, model, tokenizer):
    ids = tokenizer.encode("The sky is blue.", add_special_tokens=False)
    fields = {"prompt": [ids, ids[:5]], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    for choice, mine in zip(post(url, "/v1/completions", **fields)["choices"], (ids, ids[:5]), strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([mine])).logits[0].log_softmax(-1)
        expected = [float(logprobs[k, token]) for k, token in enumerate(mine[1:])]
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None
        assert found["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
        greedy = [max(top.values()) for top in found["top_logprobs"][1:-1]]
        assert greedy == pytest.approx(logprobs.max(-1).values[:-1].tolist(), abs=1e-4)


def test_the_evaluation_harness_gets_the_same_numbers_from_the_server(url, model, tokenizer, llama_folder):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    harness = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model=llama_folder.name,
        tokenizer=str(llama_folder),
        tokenizer_backend="huggingface",
        max_length=1024,
        batch_size=2,
    )
    pairs = [("The sky is", " blue"), ("Two and two are", " four."), ("A", " longer continuation € than the others")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, continuation), (found, is_greedy) in zip(pairs, harness.loglikelihood(asked), strict=True):
        ids = tokenizer.encode(context + continuation, add_special_tokens=False)
        start = len(tokenizer.encode(context, add_special_tokens=False))
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        chosen = [float(logprobs[k - 1, ids[k]]) for k in range(start, len(ids))]
        assert found == pytest.approx(sum(chosen), abs=1e-3)
        (scored,) = Scorer(model, 1).scores([encode_pair(tokenizer, context, continuation)])
        assert (scored.logprob, scored.is_greedy) == (pytest.approx(found, rel=1e-6), is_greedy)
        assert is_greedy == all(int(logprobs[k - 1].argmax()) == ids[k] for k in range(start, len(ids)))
    best = tokenizer.decode([int(model(torch.tensor([ids])).logits[0, -1].argmax())])
    generate = [Instance("generate_until", {}, ("".join(pairs[-1]), {"until": ["\n\n"], "max_gen_toks": 1}), 0)]
    assert harness.generate_until(generate) == [best.replace("\N{REPLACEMENT CHARACTER}", "")]


def test_a_call_is_forced(url):
    city = {"enum": ["Oslo", "Łódź"]}
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    choice = {"type": "function", "function": {"name": "weather"}}
    for wanted in ("required", choice):
        fields = {"parallel_tool_calls": False, "max_tokens": 200, "temperature": 1, "seed": 1}
        (made,) = post(url, messages=HI, tools=[tool], tool_choice=wanted, **fields)["choices"]
        (call,) = made["message"]["tool_calls"]
        assert made["finish_reason"] == "tool_calls" and call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"])["city"] in city["enum"]


def test_json_is_forced(url):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = post(url, messages=HI, response_format=wanted, max_tokens=100, temperature=1, seed=3)
    (made,) = body["choices"]
    assert made["finish_reason"] == "stop" and json.loads(made["message"]["content"])["n"] in (1, 2)


def test_stop_strings_and_limits(url):
    whole = post(url, messages=HI, ignore_eos=True, **GREEDY)["choices"][0]["message"]["content"]
    word = whole[3:5]
    body = post(url, messages=HI, ignore_eos=True, stop=[word], **GREEDY)
    assert body["choices"][0]["message"]["content"] == whole[: whole.index(word)]
    assert body["choices"][0]["finish_reason"] == "stop"
    long = [{"role": "user", "content": "x" * 850}]
    body = post(url, messages=long, ignore_eos=True, temperature=0, max_tokens=100_000)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == 1024
    assert post(url, messages=HI, ignore_eos=True, temperature=0)["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_leaves(url, stream):
    before = metric(url, "answers_canceled_total")
    with leaving(f"{url}{CHAT}", {"messages": HI, "stream": stream, "max_tokens": 900, "ignore_eos": True, "n": 64}):
        until(lambda: running(url) > 0)
    until(lambda: running(url) == 0)
    assert metric(url, "answers_canceled_total") > before


@pytest.mark.thorough
def test_a_server_is_stopped(keys, tmp_path):
    """Its socket is open before its model is loaded; a running answer ends."""
    port = free_port()
    started = Api(tmp_path, keys, program=("-c", HELD), API_PORT=str(port))
    try:
        wait_for_port(port)
        response = httpx.get(f"http://127.0.0.1:{port}/health", timeout=60)
        assert response.status_code == 503 and response.json()["error"]["type"] == "unavailable_error"
        (tmp_path / "load").touch()
        url = started.wait_until_ready()
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        body = {"messages": HI, "stream": True, "max_tokens": 300, "ignore_eos": True, "n": 4}
        with httpx.Client(timeout=60) as client, client.stream("POST", f"{url}{CHAT}", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            started.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert started.process.wait(timeout=READY_SECONDS) == 0
        assert "Traceback" not in started.errors.read_text("utf-8")
    finally:
        started.process.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_server_is_stopped_while_it_is_loading(keys, tmp_path, number, status):
    port = free_port()
    started = Api(tmp_path, keys, program=("-c", HELD), API_PORT=str(port))
    try:
        wait_for_port(port)
        httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=60)  # it answers, so it takes signals
        assert started.stop(number) == status
        assert "Traceback" not in started.errors.read_text("utf-8")
    finally:
        started.process.kill()


def test_a_wrong_run_file_is_refused_before_torch_is_imported(tmp_path):
    started = Api(tmp_path, {"model_name_or_path": str(tmp_path / "absent"), "templat": "qwen"})
    assert started.process.wait(timeout=READY_SECONDS) == 2
    message = started.errors.read_text("utf-8")
    assert "templat" in message and "absent" in message and "Traceback" not in message
    code = (
        "import sys; from luthier.cli import main\n"
        f"status = main(['api', {str(tmp_path / 'run.yaml')!r}])\n"
        "print(status, sorted({'torch', 'fastapi', 'pydantic'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "2 []"


def test_an_address_that_is_taken(keys, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        started = Api(tmp_path, keys, API_PORT=str(port))
        assert started.process.wait(timeout=READY_SECONDS) == 2
    assert f"API_PORT={port}" in started.errors.read_text("utf-8")


def test_a_model_that_cannot_be_loaded(tmp_path, llama_folder):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(llama_folder, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    started = Api(tmp_path, {"model_name_or_path": str(broken), "template": "qwen"})
    assert started.process.wait(timeout=READY_SECONDS) == 2
    message = started.errors.read_text("utf-8")
    assert "luthier: " in message and "Traceback" not in message


def test_a_missing_library_is_one_sentence_with_its_remedy(monkeypatch):
    monkeypatch.setattr(command, "is_installed", lambda module: False)
    with pytest.raises(MissingExtra, match=r"pip install 'luthier\[serve\]'") as caught:
        command.main(["absent.yaml"])
    assert caught.value.exit_status == 2
