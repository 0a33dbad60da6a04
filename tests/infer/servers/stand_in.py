"""A server that speaks as `vllm serve` or `sglang serve` does, over a tiny model of transformers, on the CPU.

    python stand_in.py vllm serve FOLDER --port 1234 ...

What it is asked goes to the folder STAND_IN_FOLDER: `argv.json`, and `calls.jsonl` with a line for each request
and one for each client that went. With a file `hold` there, each answer waits after as many tokens as it says; with a
file `die` the process ends at the next token with status 7. The options and fields are those of vLLM 0.33 and SGLang
0.5.23; unknown ones are refused.
"""

import argparse
import json
import os
import queue
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VLLM_OPTIONS = (
    *("host", "port", "served-model-name", "dtype", "max-model-len", "gpu-memory-utilization"),
    *("tensor-parallel-size", "generation-config", "structured-outputs-config", "revision", "max-lora-rank"),
    *("lora-modules", "max-num-seqs", "hf-overrides", "max-loras", "max-cpu-loras"),
)
VLLM_SWITCHES = ("enforce-eager", "trust-remote-code", "enable-lora", "enable-prefix-caching")
SGLANG_OPTIONS = (
    *("model-path", "host", "port", "api-key", "dtype", "context-length", "mem-fraction-static", "tp-size"),
    *("grammar-backend", "revision", "lora-paths", "max-loras-per-batch", "lora-backend", "max-running-requests"),
)
SGLANG_SWITCHES = ("trust-remote-code", "incremental-streaming-output", "enable-deterministic-inference")
CHOICE = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
CHOICE |= {"logit_bias", "stop_token_ids", "ignore_eos"}
VLLM_FIELDS = CHOICE | {"model", "prompt", "stream", "return_token_ids", "return_tokens_as_token_ids", "max_tokens"}
VLLM_FIELDS |= {"seed", "logprobs", "echo", "structured_outputs", "stop", "skip_special_tokens"}
SGLANG_FIELDS = {"input_ids", "stream", "sampling_params", "return_logprob", "top_logprobs_num", "logprob_start_len"}
SGLANG_FIELDS |= {"lora_path"}
SGLANG_SAMPLING = CHOICE | {"max_new_tokens", "sampling_seed", "ebnf", "json_schema"}


class Fault(Exception):
    """A request that is refused."""


def parse(kind: str, words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=kind, allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    if kind == "vllm":
        parser.add_argument("model_path")
    for name in VLLM_OPTIONS if kind == "vllm" else SGLANG_OPTIONS:
        parser.add_argument(f"--{name}", required=name == "port")
    for name in VLLM_SWITCHES if kind == "vllm" else SGLANG_SWITCHES:
        action: Any = argparse.BooleanOptionalAction if kind == "vllm" else "store_true"
        parser.add_argument(f"--{name}", action=action)
    return parser.parse_args(words)


class Served:
    def __init__(self, kind: str, arguments: argparse.Namespace) -> None:
        from luthier.model.compat import slow_imports

        slow_imports.install()
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from luthier.infer.engines.huggingface import HuggingFaceModel

        self.kind = kind
        self.folder = Path(os.environ["STAND_IN_FOLDER"])
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.model_path).eval()
        model.generation_config.stop_strings = model.generation_config.min_p = None  # as --generation-config vllm does
        limit = arguments.max_model_len if kind == "vllm" else arguments.context_length
        self.limit = int(limit)
        assert self.limit <= model.config.max_position_embeddings, "the servers refuse more than the model takes"
        adapter = arguments.lora_modules if kind == "vllm" else arguments.lora_paths
        self.adapter = None
        if adapter is not None:
            from peft import PeftModel

            entry = json.loads(adapter)
            self.adapter = entry["name" if kind == "vllm" else "lora_name"]
            path = entry["path" if kind == "vllm" else "lora_path"]
            model = PeftModel.from_pretrained(model, path).merge_and_unload()
        self.model, self.ends = model, {model.generation_config.eos_token_id}
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model_path)
        self.engine = HuggingFaceModel(model, self.tokenizer, self.ends)
        self.adapters: dict[str, Any] = {}
        self.max_adapters = int((arguments.max_cpu_loras or arguments.max_loras or 1) if kind == "vllm" else 0)
        """The oldest one makes room for one more."""
        self.key = os.environ.get("VLLM_API_KEY") if kind == "vllm" else arguments.api_key
        self.takes_seeds = kind == "vllm" or arguments.enable_deterministic_inference

    def load_adapter(self, name: str, path: str) -> None:
        from copy import deepcopy

        from peft import PeftModel

        from luthier.infer.engines.huggingface import HuggingFaceModel

        assert name not in self.adapters, "vLLM refuses a name that is taken"
        while len(self.adapters) >= self.max_adapters:
            del self.adapters[next(iter(self.adapters))]
        model: Any = PeftModel.from_pretrained(deepcopy(self.model), path).merge_and_unload()
        self.adapters[name] = HuggingFaceModel(model, self.tokenizer, self.ends)

    def reload(self, path: str) -> None:
        from safetensors.torch import load_file

        state = {
            name: weight
            for file in sorted(Path(path).glob("*.safetensors"))
            for name, weight in load_file(file).items()
        }
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not missing and not unexpected, (missing, unexpected)

    def note(self, **what: Any) -> None:
        with (self.folder / "calls.jsonl").open("a") as file:
            file.write(json.dumps(what) + "\n")

    def settings(self, sampling: dict[str, Any], **own: Any) -> Any:
        from luthier.infer.types import Settings

        return Settings(
            do_sample=sampling["temperature"] > 0,
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            top_k=max(sampling["top_k"], 0),
            min_p=sampling["min_p"],
            repetition_penalty=sampling["repetition_penalty"],
            presence_penalty=sampling["presence_penalty"],
            frequency_penalty=sampling["frequency_penalty"],
            logit_bias={int(name): value for name, value in sampling.get("logit_bias", {}).items()},
            stop_token_ids=tuple(sampling["stop_token_ids"]),
            ignore_eos=sampling["ignore_eos"],
            skip_special_tokens=sampling.get("skip_special_tokens", False),
            stop=tuple(sampling.get("stop", ())),
            **own,
        )


class Handler(BaseHTTPRequestHandler):
    served: Served

    def log_message(self, *words: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200, {})
        elif self.headers["Authorization"] != f"Bearer {self.served.key}":
            self.answer(401, {"error": "Unauthorized"})
        else:
            self.answer(200, {"data": [{"id": "base", "max_model_len": self.served.limit}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.served.note(path=self.path, body=body)
        if self.headers["Authorization"] != f"Bearer {self.served.key}":
            self.answer(401, {"error": "Unauthorized"})
            return
        if self.takes_weights(body):
            return
        try:
            ids, settings, write = (asked_of_vllm if self.served.kind == "vllm" else asked_of_sglang)(self.served, body)
        except Fault as fault:
            self.answer(400, {"error": {"message": str(fault), "type": "BadRequestError", "code": 400}})
            return
        self.stream(self.served.adapters.get(body.get("model"), self.served.engine), ids, settings, write)

    def takes_weights(self, body: dict[str, Any]) -> bool:
        """What vLLM serves with VLLM_SERVER_DEV_MODE and VLLM_ALLOW_RUNTIME_LORA_UPDATING. Whether it was that."""
        paths = []
        if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "True":
            paths += ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
        if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
            paths += ["/collective_rpc", "/reset_prefix_cache"]
        if self.path == "/v1/completions" or self.served.kind != "vllm":
            return False
        if self.path not in paths:
            self.answer(404, {"detail": "Not Found"})
        elif self.path == "/v1/load_lora_adapter":
            self.served.load_adapter(body["lora_name"], body["lora_path"])
            self.answer(200, {})
        elif self.path == "/v1/unload_lora_adapter":
            was_there = self.served.adapters.pop(body["lora_name"], None) is not None
            fault = {"error": {"message": "Failed to remove lora adapter from the engine.", "code": 500}}
            self.answer(*((200, {}) if was_there else (500, fault)))
        elif self.path == "/collective_rpc" and body["method"] == "reload_weights":
            self.served.reload(body["kwargs"]["weights_path"])
            self.answer(200, {"results": [None]})
        else:
            self.answer(200, {})
        return True

    def stream(self, engine: Any, ids: list[int], settings: Any, write: Any) -> None:
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        ticket = engine.submit(ids, settings, arrived.put)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        state: dict[str, Any] = {"prompt_ids": ids, "is_first": True}
        pending: list[Any] = []
        num_sent = 0
        try:
            while True:
                item = arrived.get()
                if isinstance(item, Exception):
                    self.send({"error": {"message": str(item), "code": 400}})
                    break
                if hasattr(item, "finish_reason"):
                    state["prompt"] = item.prompt_tokens
                    held = pending if settings.prompt_logprobs else []
                    self.send(write(state, [*held], item.finish_reason))
                    break
                if settings.prompt_logprobs:
                    pending += item.tokens
                    continue
                for token in item.tokens:
                    self.wait_to_go_on(num_sent)
                    self.send(write(state, [token], None))
                    num_sent += 1
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            ticket.cancel()
            self.served.note(gone=True)
        self.close_connection = True

    def wait_to_go_on(self, num_sent: int) -> None:
        """While an answer is held, keep-alive lines find out whether its client has gone."""
        while True:
            if (self.served.folder / "die").exists():
                print("CUDA error: an illegal memory access was encountered", flush=True)
                os._exit(7)
            try:
                limit = int((self.served.folder / "hold").read_text())
            except FileNotFoundError:
                return
            if num_sent < limit:
                return
            self.wfile.write(b": keep alive\n\n")
            time.sleep(0.01)

    def send(self, event: Any) -> None:
        self.wfile.write(f": keep alive\n\ndata: {json.dumps(event)}\n\n".encode())

    def answer(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def check_fields(given: Any, known: set[str]) -> None:
    unknown = set(given) - known
    if unknown:
        raise Fault(f"unknown fields: {sorted(unknown)}")


def asked_of_vllm(served: Served, body: dict[str, Any]) -> Any:
    check_fields(body, VLLM_FIELDS)
    if body["model"] not in (served.adapter or "base", *served.adapters):
        raise Fault(f"The model `{body['model']}` does not exist.")
    if not 0 <= body["temperature"] <= 2:
        raise Fault(f"temperature must be in [0, 2], got {body['temperature']}.")
    grammar = None
    if "structured_outputs" in body:
        from luthier.infer.grammar import json_grammar

        (kind, text), *_ = body["structured_outputs"].items()
        grammar = text if kind == "grammar" else json_grammar(text)
    settings = served.settings(
        body,
        max_new_tokens=body["max_tokens"],
        seed=body.get("seed"),
        num_logprobs=body.get("logprobs"),
        prompt_logprobs=body.get("echo", False),
        grammar=grammar,
    )

    def word(token_id: int) -> str:
        return f"token_id:{token_id}"

    def write(state: dict[str, Any], tokens: list[Any], reason: str | None) -> Any:
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": reason, "logprobs": None}
        choice["token_ids"] = [token.id for token in tokens]
        choice["prompt_token_ids"] = state["prompt_ids"] if state.pop("is_first", False) else None
        shown = [*state.get("prompt", ()), *tokens]
        if "logprobs" in body:
            # The chosen token is always among the alternatives, and comes first.
            tops = [{word(token.id): token.logprob} | {word(i): p for i, p in token.top} for token in shown]
            choice["logprobs"] = {
                "tokens": [word(token.id) for token in shown],
                "token_logprobs": [token.logprob for token in shown],
                "top_logprobs": [
                    top if token.logprob is not None else None for token, top in zip(shown, tops, strict=True)
                ],
                "text_offset": [0] * len(shown),
            }
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}

    return body["prompt"], settings, write


def asked_of_sglang(served: Served, body: dict[str, Any]) -> Any:
    check_fields(body, SGLANG_FIELDS)
    sampling = body["sampling_params"]
    check_fields(sampling, SGLANG_SAMPLING)
    if body.get("lora_path") != served.adapter:
        raise Fault(f"the adapter {body.get('lora_path')} is not loaded")
    if not 0 < sampling["top_p"] <= 1 or sampling["top_k"] == 0:
        raise Fault(f"top_p must be in (0, 1], got {sampling['top_p']}.")
    assert os.environ["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "1"
    grammar = sampling.get("ebnf")
    if "json_schema" in sampling:
        from luthier.infer.grammar import json_grammar

        grammar = json_grammar(json.loads(sampling["json_schema"]))
    settings = served.settings(
        sampling,
        max_new_tokens=sampling["max_new_tokens"],
        seed=sampling.get("sampling_seed") if served.takes_seeds else None,
        num_logprobs=body["top_logprobs_num"] if body.get("return_logprob") else None,
        prompt_logprobs=body.get("logprob_start_len") == 0,
        grammar=grammar,
    )

    def write(state: dict[str, Any], tokens: list[Any], reason: str | None) -> Any:
        meta: dict[str, Any] = {"id": "1", "finish_reason": reason and {"type": reason}}
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [[token.logprob, token.id, None] for token in tokens]
            meta["output_top_logprobs"] = [[[p, i, None] for i, p in token.top] for token in tokens]
            prompt = state.get("prompt", ())
            meta["input_token_logprobs"] = [[token.logprob, token.id, None] for token in prompt]
            meta["input_top_logprobs"] = [[[p, i, None] for i, p in token.top] or None for token in prompt]
        return {"text": "", "output_ids": [token.id for token in tokens], "meta_info": meta}

    return body["input_ids"], settings, write


def main() -> None:
    kind = sys.argv[1]
    Path(os.environ["STAND_IN_FOLDER"], "argv.json").write_text(json.dumps(sys.argv[2:]))
    arguments = parse(kind, sys.argv[2:])
    print(f"{kind}: loading", flush=True)
    Handler.served = Served(kind, arguments)
    server = ThreadingHTTPServer((arguments.host, int(arguments.port)), Handler)
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    main()
