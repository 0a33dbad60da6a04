"""`luthier api` and `luthier chat` with vLLM and SGLang as child processes; stand-ins answer for them on the CPU."""

import os
import subprocess
import sys

import httpx
import pytest

import luthier
from tests.infer.servers.programs import processes_with, stand_in_for
from tests.serve.process import api
from tests.waiting import until

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def keys(llama_folder):
    return {
        "model_name_or_path": str(llama_folder),
        "template": "chatml",
        "do_sample": False,
        "max_new_tokens": 12,
    }


@pytest.fixture(scope="module")
def answer(keys):
    """What transformers answers in this process."""
    return luthier.chat(keys).ask("Hi")


@pytest.mark.thorough
def test_the_api_answers_alike_says_what_it_lacks_and_leaves_nothing_behind(keys, answer, tmp_path):
    from openai import BadRequestError, OpenAI

    installed = stand_in_for("sglang", tmp_path / "sglang")
    with api(tmp_path / "api", {**keys, "infer_backend": "sglang"}, **installed.environ) as (url, process):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def ask(**fields):
            return client.chat.completions.create(model="any", messages=HI, **fields)

        whole = ask()
        assert whole.choices[0].message.content == answer and whole.usage.completion_tokens == 12
        chunks = list(ask(stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
        assert len(chunks) > 4 and chunks[-1].choices[0].finish_reason == "length"
        scored = client.completions.create(model="any", prompt="Hi", echo=True, logprobs=1, max_tokens=1)
        assert scored.choices[0].logprobs.token_logprobs[0] is None
        with pytest.raises(BadRequestError) as caught:
            ask(seed=1, extra_body={"do_sample": True})
        assert caught.value.body["param"] == "seed" and "enable_deterministic_inference" in caught.value.body["message"]
        with installed.holding():
            gone = installed.num_gone
            with httpx.stream(
                "POST",
                f"{url}/v1/chat/completions",
                json={"messages": HI, "max_tokens": 400, "stream": True},
                timeout=60,
            ) as response:
                next(response.iter_raw())
            until(lambda: installed.num_gone == gone + 1)
        assert httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["max_model_len"] == 512
        assert process.stop() == 0
    assert not processes_with(str(installed.folder))


@pytest.mark.thorough
def test_chat_answers_alike_and_leaves_nothing_behind(keys, answer, tmp_path):
    installed = stand_in_for("vllm", tmp_path / "vllm")
    words = [f"{name}={value}" for name, value in {**keys, "infer_backend": "vllm"}.items()]
    done = subprocess.run(
        [sys.executable, "-m", "luthier", "chat", *words, "--once", "Hi"],
        capture_output=True,
        text=True,
        env={**os.environ, **installed.environ},
    )
    assert (done.returncode, done.stdout) == (0, answer + "\n"), done.stderr
    assert not processes_with(str(installed.folder))
