"""What vLLM is started with and asked for, key by key and setting by setting, and how its events are read."""

import pytest

from luthier.config.load import load_infer
from luthier.infer.engines.vllm import ADAPTER, BASE, VllmDialect, command
from luthier.infer.servers.model import Ask
from luthier.infer.servers.start import ServerPlan
from luthier.infer.types import Settings, Token

ALWAYS = {
    "--host": "127.0.0.1",
    "--port": "1234",
    "--served-model-name": "base",
    "--dtype": "auto",
    "--max-model-len": "4096",
    "--gpu-memory-utilization": "0.7",
    "--tensor-parallel-size": "2",
    "--generation-config": "vllm",
    "--structured-outputs-config": '{"backend": "guidance"}',
}


def words(adapter=None, limit=None, revision=None, **keys) -> list[str]:
    run = load_infer({"model_name_or_path": "/m", "template": "chatml", "infer_backend": "vllm", **keys})
    plan = ServerPlan(
        model="/m",
        adapter=adapter,
        limit=limit,
        num_devices=2,
        tokenizer=None,
        stop_ids=frozenset(),
        revision=revision,
    )
    return command("/bin/vllm", run, plan, 1234)


def pairs(found: list[str]) -> dict[str, str]:
    assert found[:3] == ["/bin/vllm", "serve", "/m"]
    return dict(zip(found[3::2], found[4::2], strict=True))


def test_the_command_without_keys():
    assert pairs(words()) == ALWAYS


@pytest.mark.parametrize(
    ("keys", "changed"),
    [
        ({"vllm_maxlen": 8192}, {"--max-model-len": "8192"}),
        ({"vllm_gpu_util": 0.9}, {"--gpu-memory-utilization": "0.9"}),
        ({"infer_dtype": "bfloat16"}, {"--dtype": "bfloat16"}),
        ({"limit": 512}, {"--max-model-len": "512"}),
        ({"revision": "v2"}, {"--revision": "v2"}),
        ({"vllm_config": '{"max_num_seqs": 8}'}, {"--max-num-seqs": "8"}),
        ({"vllm_config": {"tensor_parallel_size": 1}}, {"--tensor-parallel-size": "1"}),
        ({"vllm_config": {"hf-overrides": {"a": 1}}}, {"--hf-overrides": '{"a": 1}'}),
    ],
    ids=str,
)
def test_each_key_is_an_option(keys, changed):
    assert pairs(words(**keys)) == ALWAYS | changed


def test_switches_stand_alone():
    plain = words()
    assert words(vllm_enforce_eager=True) == [*plain, "--enforce-eager"]
    assert words(trust_remote_code=True) == [*plain, "--trust-remote-code"]
    assert words(vllm_config={"enable_prefix_caching": False}) == [*plain, "--no-enable-prefix-caching"]


def test_an_adapter_is_a_module():
    given = ["--enable-lora", "--max-lora-rank", "64", "--lora-modules", '{"name": "adapter", "path": "/a b"}']
    assert words(adapter="/a b", vllm_max_lora_rank=64) == [*words(), *given]


GREEDY = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "top_k": 50}
GREEDY |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
BODY = {"model": BASE, "prompt": [1, 2], "stream": True, "return_token_ids": True, "max_tokens": 7}
BODY |= {"return_tokens_as_token_ids": True, "stop_token_ids": [5, 9], "ignore_eos": True}
SAMPLED = {"temperature": 0.95, "top_p": 0.7}


def body(settings: Settings, model=BASE, num_new_tokens=7):
    ask = Ask(prompt_ids=(1, 2), settings=settings, num_new_tokens=num_new_tokens, stop_ids={9, 5})
    return VllmDialect(model).body(ask)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"do_sample": False}, {}),
        ({"temperature": 0}, {}),
        ({"top_p": 0}, {}),
        ({}, SAMPLED),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 7}, {"temperature": 0.5, "top_p": 0.9, "top_k": 7}),
        ({"top_k": 0}, {**SAMPLED, "top_k": 0}),
        ({"min_p": 0.1}, {**SAMPLED, "min_p": 0.1}),
        ({"seed": -3}, {**SAMPLED, "seed": -3}),
        ({"do_sample": False, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"do_sample": False, "presence_penalty": -2.0}, {"presence_penalty": -2.0}),
        ({"do_sample": False, "frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
        ({"do_sample": False, "logit_bias": {3: -100.0}}, {"logit_bias": {"3": -100.0}}),
        ({"do_sample": False, "num_logprobs": 0}, {"logprobs": 0}),
        ({"do_sample": False, "num_logprobs": 2, "prompt_logprobs": True}, {"logprobs": 2, "echo": True}),
        ({"do_sample": False, "grammar": 'start: "a"'}, {"structured_outputs": {"grammar": 'start: "a"'}}),
        (
            {"do_sample": False, "grammar": '{ "grammars": [{ "json_schema": {"type": "object"} }] }'},
            {"structured_outputs": {"json": {"type": "object"}}},
        ),
        # These are seen to where the answer is read: its stop strings, its text, its end tokens (`stop_ids`).
        ({"do_sample": False, "stop": ("x",), "skip_special_tokens": False, "ignore_eos": True}, {}),
    ],
    ids=str,
)
def test_each_setting_is_a_field(settings, changed):
    assert body(Settings(**settings)) == BODY | GREEDY | changed


def test_an_adapter_is_another_model_and_a_scored_prompt_has_no_answer():
    assert body(Settings(do_sample=False), model=ADAPTER)["model"] == ADAPTER
    assert body(Settings(do_sample=False), num_new_tokens=0)["max_tokens"] == 0


def read(choice, **settings):
    ask = Ask(prompt_ids=(1, 2), settings=Settings(**settings), num_new_tokens=7, stop_ids=())
    return VllmDialect(BASE).read({"choices": [{"index": 0, "text": "", **choice}]}, ask)


def test_events_hold_tokens_and_the_reason_of_the_end():
    event = read({"token_ids": [4, 5], "finish_reason": None})
    assert (event.tokens, event.finish_reason) == ((Token(4), Token(5)), None)
    assert read({"token_ids": [], "finish_reason": "length"}).finish_reason == "length"
    assert read({"token_ids": None, "finish_reason": "abort"}).fault == "the answer ended with abort"
    usage = VllmDialect(BASE).read({"choices": [], "usage": {}}, None)
    assert (usage.tokens, usage.finish_reason) == ((), None)


def test_the_chosen_token_is_no_alternative_unless_it_is_among_the_best():
    logprobs = {
        "tokens": ["token_id:1", "token_id:2", "token_id:7"],
        "token_logprobs": [None, -1.0, -3.0],
        "top_logprobs": [None, {"token_id:2": -1.0}, {"token_id:7": -3.0, "token_id:8": -0.5, "token_id:9": -1.5}],
    }
    choice = {"token_ids": [7], "prompt_token_ids": [1, 2], "finish_reason": None, "logprobs": logprobs}
    event = read(choice, num_logprobs=2, prompt_logprobs=True)
    assert event.prompt_tokens == (Token(1), Token(2, -1.0, ((2, -1.0),)))
    assert event.tokens == (Token(7, -3.0, ((8, -0.5), (9, -1.5))),)
    assert read(choice, num_logprobs=0, prompt_logprobs=True).tokens == (Token(7, -3.0),)
