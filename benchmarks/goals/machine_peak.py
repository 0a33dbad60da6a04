"""The speed of a large matrix product, one in each turn: what a step can reach at most.

Also the number of operations that a step of LoRA needs, to be divided by its time.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.data.shared_prefixes import concatenate_sharing_prefixes

if TYPE_CHECKING:
    from benchmarks.goals.child import Work
    from benchmarks.goals.clock import Clock

SIZE = 4096
OPERATIONS = 2 * SIZE**3


def run(work: "Work", clock: "Clock") -> None:
    import torch

    from luthier.model.kernels.products import product

    dtype = torch.bfloat16 if work.keys.get("bf16") else torch.float32
    left, right = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    for _ in range(work.keys["max_steps"]):
        clock.begin()
        product(left, right)  # by the faster library
        clock.end()


def operations_of_lora(
    config: Mapping[str, Any], rank: int, rows: Sequence[Mapping[str, Any]], *, shares: bool = False
) -> float:
    """Of one forward and backward pass over these rows of a Llama-like model with LoRA on all linear layers. `shares`:
    tokens that several rows begin with are computed once.

    T tokens, K of them predicted, P weights of the layers, A of the adapters, H hidden size times vocabulary; a product
    takes 2 operations for each weight and token. Frozen weights get no gradient:

        4 P T + 4 H K + 6 A T + 6 D sum(length^2)

    The last term is attention: D the width of all heads of all layers, half of each square by causality. What is
    computed again is not counted.
    """
    hidden, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    head_width = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = (config[key] * head_width for key in ("num_attention_heads", "num_key_value_heads"))
    shapes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    weights = layers * sum(one * other for one, other in shapes)
    adapters = layers * rank * sum(one + other for one, other in shapes)
    lengths = [len(row["input_ids"]) for row in rows]
    predicted = sum(label != -100 for row in rows for label in row["labels"][1:])
    tokens = concatenate_sharing_prefixes(rows)["input_ids"].numel() if shares else sum(lengths)
    attention = 6 * queries * layers * sum(length**2 for length in lengths)
    return 4 * weights * tokens + 4 * hidden * config["vocab_size"] * predicted + 6 * adapters * tokens + attention
