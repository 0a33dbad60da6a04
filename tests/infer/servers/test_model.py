"""Answers through vLLM and SGLang are those of transformers in this process; the servers are stand-ins on the CPU."""

import threading

import pytest

from luthier.config.load import load_infer
from luthier.core.errors import InvalidInput, RunFailed
from luthier.core.kinds import ENGINES
from luthier.infer.engines.huggingface import HuggingFaceModel
from luthier.infer.grammar import json_grammar, lark_grammar
from luthier.infer.servers import model as served_model
from luthier.infer.types import Answer, Settings, UnsupportedSetting
from luthier.model.files.sources import model_source
from tests import tiny
from tests.infer.servers.programs import processes_with, stand_in_for
from tests.matrix import representatives
from tests.waiting import until
from tests.workflow.test_export import adapter

PROMPT = [72, 105, 33]
EOS = 260
GREEDY = Settings(do_sample=False, max_new_tokens=24)
ENGINES_UNDER_TEST = ("vllm", "sglang")


def opened(name, folder, installed, **keys):
    run = load_infer({"model_name_or_path": str(folder), "template": "chatml", "infer_backend": name, **keys})
    with pytest.MonkeyPatch.context() as environment:
        for variable, value in installed.environ.items():
            environment.setenv(variable, value)
        return ENGINES.get(name).open(run, model_source(run.model), tiny.byte_tokenizer(), {EOS})


@pytest.fixture(scope="module")
def lora(llama_folder, tmp_path_factory):
    return adapter(llama_folder, tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture(scope="module")
def here(llama_folder, tokenizer):
    """The same model in this process."""
    from transformers import AutoModelForCausalLM

    return HuggingFaceModel(AutoModelForCausalLM.from_pretrained(llama_folder).eval(), tokenizer, {EOS})


@pytest.fixture(scope="module", params=representatives(ENGINES_UNDER_TEST, "vllm"))
def served(request, llama_folder, tmp_path_factory):
    """(the served model, its program)."""
    installed = stand_in_for(request.param, tmp_path_factory.mktemp(request.param))
    config = {"sglang_config": {"enable_deterministic_inference": True}} if request.param == "sglang" else {}
    model = opened(request.param, llama_folder, installed, **config)
    yield model, installed
    assert processes_with(str(installed.folder))
    model.close()
    until(lambda: not processes_with(str(installed.folder)))


SETTINGS = {
    "greedy": GREEDY,
    "sampled": Settings(seed=7, temperature=1.5, top_p=0.9, top_k=40, max_new_tokens=24),
    "all tokens": Settings(seed=7, top_k=0, top_p=1.0, min_p=0.01, max_new_tokens=24),
    "penalties": Settings(do_sample=False, presence_penalty=1.0, frequency_penalty=0.5, max_new_tokens=24),
    "bias": Settings(do_sample=False, logit_bias={65: 100.0, 66: -100.0}, max_new_tokens=4),
    "log-probabilities": Settings(do_sample=False, num_logprobs=3, max_new_tokens=6),
    "prompt": Settings(do_sample=False, num_logprobs=2, prompt_logprobs=True, max_new_tokens=3),
    "special": Settings(seed=3, temperature=2.0, top_k=0, top_p=1.0, skip_special_tokens=False, max_new_tokens=48),
    "length": Settings(do_sample=False, max_new_tokens=0, max_length=9),
}


def without_rounding(answer: Answer):
    def rounded(tokens):
        return [
            (
                token.id,
                token.logprob and round(token.logprob, 4),
                [(other, round(value, 4)) for other, value in token.top],
            )
            for token in tokens
        ]

    return (
        *(answer.text, answer.num_prompt_tokens, answer.num_new_tokens, answer.finish_reason),
        *(rounded(answer.tokens), rounded(answer.prompt_tokens)),
    )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_answer_is_that_of_this_process(served, here, settings):
    model, _ = served
    assert without_rounding(model.generate(PROMPT, settings)) == without_rounding(here.generate(PROMPT, settings))


def test_a_stop_string_ends_the_answer_and_the_request(served, here):
    model, installed = served
    whole = here.generate(PROMPT, GREEDY).text
    settings = Settings(do_sample=False, max_new_tokens=400, stop=(whole[3:6],))
    with installed.holding():
        gone = installed.num_gone
        answer = model.generate(PROMPT, settings)
        assert (answer.text, answer.finish_reason) == (whole[:3], "stop")
        until(lambda: installed.num_gone == gone + 1)


def test_a_stop_token_ends_the_answer_unless_it_is_ignored(served, here):
    model, _ = served
    tokens = here.generate(PROMPT, GREEDY).tokens
    stop = Settings(do_sample=False, max_new_tokens=24, stop_token_ids=(tokens[4].id,))
    answer = model.generate(PROMPT, stop)
    assert answer.finish_reason == "stop" and answer == here.generate(PROMPT, stop)
    biased = {"do_sample": False, "max_new_tokens": 4, "logit_bias": {EOS: 100.0}}
    assert model.generate(PROMPT, Settings(**biased)).num_new_tokens == 1
    ignoring = model.generate(PROMPT, Settings(**biased, ignore_eos=True))
    assert (ignoring.num_new_tokens, ignoring.finish_reason) == (4, "length")


def test_an_answer_follows_a_grammar(served, here):
    pytest.importorskip("llguidance")
    model, _ = served
    schema = json_grammar({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]})
    for grammar in (schema, lark_grammar('start: "yes" | "no"')):
        settings = Settings(do_sample=False, max_new_tokens=40, grammar=grammar)
        assert model.generate(PROMPT, settings) == here.generate(PROMPT, settings)


def test_a_fault_of_the_grammar_is_that_of_the_request(served):
    pytest.importorskip("llguidance")
    model, _ = served
    with pytest.raises(InvalidInput, match=r"refuses this: .*nowhere"):
        model.generate(PROMPT, Settings(grammar="start: nowhere"))


def test_many_answers_at_once_are_those_of_each_alone(served, here):
    model, _ = served
    arrived, done = {}, threading.Event()

    def deliver_to(number):
        def deliver(item):
            if isinstance(item, Answer | Exception):
                arrived[number] = item
                if len(arrived) == 12:
                    done.set()

        return deliver

    prompts = [[72 + number, 105] for number in range(12)]
    for number, prompt in enumerate(prompts):
        model.submit(prompt, GREEDY, deliver_to(number))
    assert done.wait(120)
    assert [arrived[number] for number in range(12)] == [here.generate(prompt, GREEDY) for prompt in prompts]


def test_a_stream_that_is_closed_ends_the_request(served):
    model, installed = served
    with installed.holding():
        gone = installed.num_gone
        stream = model.stream(PROMPT, Settings(do_sample=False, max_new_tokens=400))
        assert next(stream)
        stream.close()
        until(lambda: installed.num_gone == gone + 1)
    assert model.generate(PROMPT, GREEDY).text


def test_what_is_canceled_delivers_nothing_more_and_waits_for_nobody(served):
    model, installed = served
    items = []
    with installed.holding():
        before = installed.num_requests
        tickets = [model.submit(PROMPT, Settings(do_sample=False, max_new_tokens=400), items.append) for _ in range(10)]
        until(lambda: installed.num_requests == before + 8 and len(items) >= 8)  # two wait
        for ticket in reversed(tickets):  # those that wait first, or they would begin
            ticket.cancel()
        num = len(items)
        answer = model.generate(PROMPT, Settings(do_sample=False, max_new_tokens=1))
    assert answer.num_new_tokens == 1
    assert len(items) <= num + 8  # one of each may have been under way
    assert not any(isinstance(item, Answer | Exception) for item in items)
    assert installed.num_requests == before + 9
    tickets[0].cancel()  # after the end it does nothing


def test_beams_and_long_prompts_are_refused_before_they_are_sent(served):
    model, installed = served
    num_requests = installed.num_requests
    with pytest.raises(UnsupportedSetting, match=r"^num_beams: .* has no beam search that streams"):
        model.submit(PROMPT, Settings(num_beams=2))
    with pytest.raises(InvalidInput, match="no room for an answer: the prompt has 600 tokens and the model takes 512"):
        model.submit([72] * 600, GREEDY)
    assert installed.num_requests == num_requests


def test_a_stop_string_of_the_model_ends_the_answer(served, here):
    model, _ = served
    whole = here.generate(PROMPT, GREEDY).text
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model, "_stops", (whole[3:6],))
        answer = model.generate(PROMPT, GREEDY)
    assert (answer.text, answer.finish_reason) == (whole[:3], "stop")


@pytest.mark.parametrize("event", ["text", ["list"], {"choices": ["text"]}, {"choices": [{"token_ids": [-1]}]}, None])
def test_an_event_in_another_form_ends_its_answer_alone(served, monkeypatch, event):
    """Whoever waits for an answer would wait for good, and one thread less would answer."""
    model, _ = served
    with monkeypatch.context() as patched:
        patched.setattr(served_model.Call, "events", lambda call: iter([event]))
        patched.setattr(served_model, "_DEATH_SECONDS", 0.0)
        with pytest.raises(RunFailed, match="answers in a form that luthier does not know"):
            model.generate(PROMPT, GREEDY)
    assert model.generate(PROMPT, GREEDY).text


@pytest.mark.parametrize("name", representatives(ENGINES_UNDER_TEST, "vllm"))
def test_with_its_adapter_and_then_without_its_server(name, llama_folder, lora, tmp_path, monkeypatch):
    """One start for both: an adapter answers, the server dies in the middle of an answer, and later ones fail too."""
    monkeypatch.setattr(served_model, "_DEATH_SECONDS", 120.0)
    installed = stand_in_for(name, tmp_path / "program")
    model = opened(name, llama_folder, installed, adapter_name_or_path=str(lora))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_folder), lora).merge_and_unload()
    assert (
        model.generate(PROMPT, GREEDY).text
        == HuggingFaceModel(adapted, model.tokenizer, {EOS}).generate(PROMPT, GREEDY).text
    )
    with installed.holding():
        stream = model.stream(PROMPT, Settings(do_sample=False, max_new_tokens=400))
        assert next(stream)
        (installed.folder / "die").touch()
        with pytest.raises(
            RunFailed, match=rf"^{name} ended with status 7 -> its log says why: .*illegal memory access"
        ):
            list(stream)
    with pytest.raises(RunFailed, match="ended with status 7"):
        model.generate(PROMPT, GREEDY)
    model.close()
    assert not processes_with(str(installed.folder))
    model.server.log.unlink()
