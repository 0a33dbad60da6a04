"""What SGLang is started with and asked for, key by key and setting by setting, and how its events are read."""

import json

import pytest

from luthier.config.load import load_infer
from luthier.core.errors import InvalidInput
from luthier.infer.engines.sglang import ADAPTER, SglangDialect, command
from luthier.infer.servers.model import Ask
from luthier.infer.servers.start import ServerPlan
from luthier.infer.types import Settings, Token, UnsupportedSetting

ALWAYS = {
    "--model-path": "/m",
    "--host": "127.0.0.1",
    "--port": "1234",
    "--api-key": "k",
    "--dtype": "auto",
    "--context-length": "4096",
    "--mem-fraction-static": "0.7",
    "--tp-size": "2",
    "--grammar-backend": "llguidance",
}
LAST = "--incremental-streaming-output"


def words(adapter=None, limit=None, **keys) -> list[str]:
    run = load_infer({"model_name_or_path": "/m", "template": "chatml", "infer_backend": "sglang", **keys})
    plan = ServerPlan(model="/m", adapter=adapter, limit=limit, num_devices=2, tokenizer=None, stop_ids=frozenset())
    return command("/bin/sglang", run, plan, 1234, "k")


def pairs(found: list[str]) -> dict[str, str]:
    assert found[:2] == ["/bin/sglang", "serve"]
    rest = [word for word in found[2:] if word != LAST]
    assert len(rest) == len(found) - 3
    return dict(zip(rest[::2], rest[1::2], strict=True))


def test_the_command_without_keys():
    assert pairs(words()) == ALWAYS


@pytest.mark.parametrize(
    ("keys", "changed"),
    [
        ({"sglang_maxlen": 8192}, {"--context-length": "8192"}),
        ({"limit": 512}, {"--context-length": "512"}),
        ({"sglang_mem_fraction": 0.9}, {"--mem-fraction-static": "0.9"}),
        ({"sglang_tp_size": 4}, {"--tp-size": "4"}),
        ({"infer_dtype": "float16"}, {"--dtype": "float16"}),
        ({"sglang_config": {"max_running_requests": 8}}, {"--max-running-requests": "8"}),
    ],
    ids=str,
)
def test_each_key_is_an_option(keys, changed):
    assert pairs(words(**keys)) == ALWAYS | changed


def test_switches_stand_alone_and_false_leaves_one_out():
    plain = words()
    assert words(trust_remote_code=True) == [*plain, "--trust-remote-code"]
    given = {"enable_deterministic_inference": True, "disable_radix_cache": False}
    assert words(sglang_config=given) == [*plain, "--enable-deterministic-inference"]


def test_an_adapter_is_a_path_with_its_kernels():
    lora = '{"lora_name": "adapter", "lora_path": "/a b"}'
    given = ["--lora-paths", lora, "--max-loras-per-batch", "2", "--lora-backend", "flashinfer"]
    assert words(adapter="/a b", sglang_lora_backend="flashinfer") == [*words(), *given]


GREEDY = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "top_k": 50}
GREEDY |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
GREEDY |= {"max_new_tokens": 7, "stop_token_ids": [5, 9], "ignore_eos": False}
SAMPLED = {"temperature": 0.95, "top_p": 0.7}


def body(settings: Settings, adapter=None, *, takes_seeds=False, num_new_tokens=7):
    ask = Ask(prompt_ids=(1, 2), settings=settings, num_new_tokens=num_new_tokens, stop_ids={9, 5})
    return SglangDialect(adapter, takes_seeds=takes_seeds).body(ask)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"do_sample": False}, {}),
        ({"top_p": 0}, {}),
        ({}, SAMPLED),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 7}, {"temperature": 0.5, "top_p": 0.9, "top_k": 7}),
        ({"top_k": 0}, {**SAMPLED, "top_k": -1}),
        ({"min_p": 0.1}, {**SAMPLED, "min_p": 0.1}),
        ({"seed": 3}, {**SAMPLED, "sampling_seed": 3}),
        ({"do_sample": False, "presence_penalty": -2.0}, {"presence_penalty": -2.0}),
        ({"do_sample": False, "frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
        ({"do_sample": False, "logit_bias": {3: -100.0}}, {"logit_bias": {"3": -100.0}}),
        ({"do_sample": False, "ignore_eos": True}, {"ignore_eos": True}),
        ({"do_sample": False, "grammar": 'start: "a"'}, {"ebnf": 'start: "a"'}),
        (
            {"do_sample": False, "grammar": '{ "grammars": [{ "json_schema": {"type": "object"} }] }'},
            {"json_schema": json.dumps({"type": "object"})},
        ),
        ({"do_sample": False, "stop": ("x",), "skip_special_tokens": False}, {}),
    ],
    ids=str,
)
def test_each_setting_is_a_parameter(settings, changed):
    assert body(Settings(**settings)) == {"input_ids": [1, 2], "stream": True, "sampling_params": GREEDY | changed}


def test_answers_without_a_seed_differ_where_sglang_would_use_one_seed_for_all():
    seeds = {body(Settings(), takes_seeds=True)["sampling_params"]["sampling_seed"] for _ in range(8)}
    assert len(seeds) > 1 and all(0 <= seed < 2**31 for seed in seeds)
    assert body(Settings(seed=0), takes_seeds=True)["sampling_params"]["sampling_seed"] == 0
    assert "sampling_seed" not in body(Settings(do_sample=False), takes_seeds=True)["sampling_params"]


def test_log_probabilities_and_adapters_stand_beside_the_parameters():
    asked = body(Settings(num_logprobs=2, prompt_logprobs=True), adapter=ADAPTER)
    assert (asked["return_logprob"], asked["top_logprobs_num"], asked["logprob_start_len"]) == (True, 2, 0)
    assert asked["lora_path"] == ADAPTER
    assert "logprob_start_len" not in body(Settings(num_logprobs=0))
    # A prompt that fills the model is scored, and has no answer.
    assert body(Settings(), num_new_tokens=-2)["sampling_params"]["max_new_tokens"] == 0


def test_settings_that_would_mean_something_else_are_refused():
    dialect = SglangDialect(None, takes_seeds=False)
    with pytest.raises(UnsupportedSetting, match=r"^repetition_penalty: SGLang leaves the tokens of the prompt out"):
        dialect.check(Settings(repetition_penalty=1.1))
    with pytest.raises(InvalidInput, match=r"^seed: .*enable_deterministic_inference: true"):
        dialect.check(Settings(seed=1))
    dialect.check(Settings(seed=1, do_sample=False))  # there is nothing random in it
    SglangDialect(None, takes_seeds=True).check(Settings(seed=1))


def read(event, **settings):
    ask = Ask(prompt_ids=(1, 2), settings=Settings(**settings), num_new_tokens=7, stop_ids=())
    return SglangDialect(None, takes_seeds=False).read(event, ask)


def test_events_hold_tokens_and_the_reason_of_the_end():
    event = read({"output_ids": [4, 5], "meta_info": {"finish_reason": None}})
    assert (event.tokens, event.finish_reason) == ((Token(4), Token(5)), None)
    stopped = {"output_ids": [9], "meta_info": {"finish_reason": {"type": "stop", "matched": 9}}}
    assert read(stopped).finish_reason == "stop"
    aborted = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort", "message": "no memory"}}}
    assert read(aborted).fault == "no memory"


def test_log_probabilities_of_answer_and_prompt():
    meta = {
        "finish_reason": None,
        "output_token_logprobs": [[-3.0, 7, None]],
        "output_top_logprobs": [[[-0.5, 8, None], [-1.5, 9, None]]],
        "input_token_logprobs": [[None, 1, None], [-1.0, 2, None]],
        "input_top_logprobs": [None, [[-1.0, 2, None]]],
    }
    event = read({"output_ids": [7], "meta_info": meta}, num_logprobs=2, prompt_logprobs=True)
    assert event.tokens == (Token(7, -3.0, ((8, -0.5), (9, -1.5))),)
    assert event.prompt_tokens == (Token(1), Token(2, -1.0, ((2, -1.0),)))
    assert read({"output_ids": [7], "meta_info": meta}, num_logprobs=0).tokens == (Token(7, -3.0),)
    with pytest.raises(ValueError, match="2 tokens come with 1 log-probabilities"):
        read({"output_ids": [7, 8], "meta_info": meta}, num_logprobs=0)
