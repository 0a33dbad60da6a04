"""Rules about `rollout_backend: vllm`, whose server reads the model from its folder and knows of no changes to it."""

from typing import Any
from urllib.parse import urlsplit

from luthier.config.keys.quantization import GROWING_KEYS
from luthier.config.rules.engine import When, all_of, is_given, is_turned_on, warning, within
from luthier.core.addresses import is_address

_CHANGED = {
    "quantization_bit": "the server would answer with weights that are not quantized",
    "rope_scaling": "the server takes positions as the config.json of the model has them",
    "train_from_scratch": "the server loads the weights of the model",
    "mixture_of_depths": "the server computes every layer for every token",
}
_served = When(lambda run: run.method.rollout_backend == "vllm")


def _is_no_address(run: Any) -> bool:
    address = run.method.rollout_server or ""
    if not is_address(address):
        return True
    parts = urlsplit(address)
    return parts.scheme != "http" or "@" in parts.netloc or bool(parts.path.strip("/") or parts.query or parts.fragment)


SERVED_RULES = (
    *(
        warning(
            (key, "rollout_backend"),
            "is not read, since the model in training samples the answers itself",
            "set rollout_backend: vllm, or leave it out",
            all_of(is_turned_on(key), lambda run: run.method.rollout_backend != "vllm"),
        )
        for key in ("rollout_server", "rollout_folder", "rollout_gpu_util")
    ),
    _served.refuses(
        ("rollout_server",),
        "is not the address of a server",
        "write http://host:port",
        all_of(is_given("method", "rollout_server"), _is_no_address),
    ),
    within("method", "rollout_gpu_util", 0.01, 1, or_high=False),
    *(
        _served.refuses((key, "rollout_backend"), reason, "leave one of the two out", is_turned_on(key))
        for key, reason in _CHANGED.items()
    ),
    *(
        _served.refuses(
            (key, "rollout_backend"),
            "the server has no rows for new tokens in its embedding",
            "add them to the model with `luthier export` first, and train that",
            is_turned_on(key),
        )
        for key in GROWING_KEYS
    ),
    _served.refuses(
        ("adapter_name_or_path", "rollout_backend"),
        "the server would answer without the adapters that are merged before training",
        "merge them with `luthier export`, and train that model",
        lambda run: len(run.model.adapter_name_or_path) > 1 or bool(run.given.get("create_new_adapter")),
    ),
)
