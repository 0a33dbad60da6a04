"""A saved model folder as one GGUF file, for llama.cpp, Ollama and whatever else reads the format.

The tensors are read, converted and written one by one, so the model is never in memory as a whole. Norms, biases and
other vectors stay float32. What differs from the layout of transformers:

- Llama and Mistral: the rows of W_q and W_k of each head are interleaved, (x_0, x_{d/2}, x_1, x_{d/2+1}, ...), since
  GGUF rotates neighbors and transformers rotates halves.
- Gemma: the weights of the norms are stored as 1 + w.
- Llama 3: the stretched rotary frequencies are a tensor, `rope_freqs.weight`, by which the plain ones are divided.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.core.errors import ModelError, RunFailed
from luthier.core.log import warn
from luthier.model.classes import require_dense
from luthier.model.compat.gguf_tokens import PREPENDS
from luthier.model.files.gguf.frequencies import head_dim, llama3_factors, rope_parameters
from luthier.model.files.gguf.vocabulary import Vocabulary, read_vocabulary
from luthier.model.files.sources import weight_files

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

NumberFormat = Literal["f32", "f16", "bf16", "q8_0"]
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
_Q8_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Layout:
    """What GGUF makes of one model type."""

    architecture: str
    interleaves: bool = False
    """Rows of W_q and W_k, as above."""
    adds_one: bool = False
    """To the weights of norms."""
    has_window: bool = False
    """Whether GGUF holds how far attention looks back."""
    norm_epsilon: str = "rms_norm_eps"


LAYOUTS = {
    "llama": Layout("llama", interleaves=True),
    "mistral": Layout("llama", interleaves=True),
    "qwen2": Layout("qwen2"),
    "qwen3": Layout("qwen3"),
    "gemma2": Layout("gemma2", adds_one=True, has_window=True),
    "gemma3_text": Layout("gemma3", adds_one=True, has_window=True),
    "phi3": Layout("phi3", has_window=True),
    "starcoder2": Layout("starcoder2", norm_epsilon="norm_epsilon"),
}
"""`model_type` -> layout."""
_NOT_IN_GGUF = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True}
"""Setting of YaRN -> what it is where nothing is set."""


def check_writable(config: "PreTrainedConfig") -> Layout:
    """Raises `ModelError` for a model that cannot be written as GGUF without losing a part of it."""
    require_dense(config, "export_gguf")
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        raise _cannot(f"models of type {config.model_type}", f"only {', '.join(LAYOUTS)}")
    kind = rope_parameters(config).get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise _cannot(f"the rotary embedding {kind!r}", "only default, linear, yarn and llama3")
    if rope_parameters(config).get("partial_rotary_factor", 1.0) != 1.0:
        raise _cannot("a rotary embedding of a part of each head", "only of the whole head")
    rope = rope_parameters(config)
    lost = [name for name, usual in _NOT_IN_GGUF.items() if rope.get(name) not in (None, usual)]
    if lost:
        raise _cannot(f"a rotary embedding with {', '.join(lost)}", "only what follows from the factor")
    if layout.adds_one and not _has_usual_layers(config):
        raise _cannot("an unusual order of layers with and without a window", f"only that of {config.model_type}")
    return layout


def _has_usual_layers(config: "PreTrainedConfig") -> bool:
    """Readers know which layers of a Gemma look back as far as the window, and how these count positions."""
    kind: Any = type(config)
    usual = kind(num_hidden_layers=config.num_hidden_layers)
    nearby = [(one.rope_parameters or {}).get("sliding_attention") for one in (config, usual)]
    return config.layer_types == usual.layer_types and nearby[0] == nearby[1]


def _warn_of_window(config: "PreTrainedConfig", layout: Layout) -> None:
    window = getattr(config, "sliding_window", None)
    if not layout.has_window and window is not None and window < config.max_position_embeddings:
        warn(
            f"export_gguf: a token of this model looks back {window:,} tokens, and GGUF does not say so of models of"
            f" type {config.model_type}: with longer texts the file answers differently"
        )


def _cannot(what: str, instead: str) -> ModelError:
    return ModelError(
        f"export_gguf: {what} cannot be written as GGUF, {instead} -> leave export_gguf out and convert the exported "
        "folder with a program that knows the model"
    )


def write_gguf(folder: Path, file: Path, number_format: NumberFormat, *, trust_remote_code: bool = False) -> None:
    """The model and tokenizer saved in `folder`, as `file`. Raises `ModelError` and `RunFailed`."""
    from gguf import GGUFWriter
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    layout = check_writable(config)
    _warn_of_window(config, layout)
    vocabulary = read_vocabulary(tokenizer, config.vocab_size)
    writer = GGUFWriter(None, layout.architecture)
    _add_hyperparameters(writer, config, layout, folder)
    writer.add_file_type(_FILE_TYPES[number_format])
    _add_vocabulary(writer, vocabulary, tokenizer)
    tensors = list(_tensors(folder, config, layout, number_format))
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, _dtype(tensor.format), tensor.num_bytes, tensor.raw_type)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for tensor in tensors:
            writer.write_tensor_data(tensor.read())
    finally:
        writer.close()


def _add_hyperparameters(writer: "GGUFWriter", config: "PreTrainedConfig", layout: Layout, folder: Path) -> None:
    rope = rope_parameters(config)
    writer.add_name(f"{folder.name} by luthier")  # transformers takes a bare "mistral" for an architecture
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    epsilon = float(getattr(config, layout.norm_epsilon))
    (writer.add_layer_norm_eps if layout.norm_epsilon == "norm_epsilon" else writer.add_layer_norm_rms_eps)(epsilon)
    if layout.has_window and config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    if layout.adds_one:
        for value, add in (
            (config.attn_logit_softcapping, writer.add_attn_logit_softcapping),
            (config.final_logit_softcapping, writer.add_final_logit_softcapping),
        ):
            if value is not None:
                add(float(value))
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_string(f"{layout.architecture}.rope.scaling.type", rope["rope_type"])
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if original := rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(int(original))
        for bound in ("beta_fast", "beta_slow"):  # gguf 0.17 has no functions for these
            if rope.get(bound) is not None:
                writer.add_float32(f"{layout.architecture}.rope.scaling.yarn_{bound}", float(rope[bound]))


def _add_vocabulary(writer: "GGUFWriter", vocabulary: Vocabulary, tokenizer: "PreTrainedTokenizerBase") -> None:
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for index, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if index is not None:
            add(index)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if vocabulary.kind == "llama":
        writer.add_add_space_prefix(vocabulary.adds_space)
        if vocabulary.scheme is not None:
            writer.add_string(PREPENDS, vocabulary.scheme)
    elif not vocabulary.merges:
        writer.add_token_scores([0.0] * len(vocabulary.tokens))  # readers want one of the two
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    """In GGUF."""
    shape: tuple[int, ...]
    format: NumberFormat
    load: "Callable[[], torch.Tensor]"
    """The numbers in the layout of GGUF."""

    @property
    def raw_type(self) -> Any:
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType[self.format.upper()]

    @property
    def num_bytes(self) -> int:
        from gguf import GGML_QUANT_SIZES

        count, (block, block_bytes) = 1, GGML_QUANT_SIZES[self.raw_type]
        for length in self.shape:
            count *= length
        return count // block * block_bytes

    def read(self) -> "np.ndarray[Any, Any]":
        """Raises `RunFailed` if a number is too large for the format."""
        import numpy as np
        from gguf.quants import quantize

        numbers = self.load().float().contiguous().numpy()
        if self.format == "f16" and (np.abs(numbers) > np.finfo(np.float16).max).any():
            raise RunFailed(
                f"export_gguf: {self.name} holds numbers too large for float16 -> set export_gguf: bf16 or f32"
            )
        return quantize(numbers, self.raw_type)


def _dtype(number_format: NumberFormat) -> Any:
    import numpy as np

    return np.dtype(np.float16 if number_format == "f16" else np.float32)  # only read where there is no raw type


def _tensors(
    folder: Path, config: "PreTrainedConfig", layout: Layout, number_format: NumberFormat
) -> Iterator[_Tensor]:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from safetensors import safe_open

    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == layout.architecture)
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    if rope_parameters(config).get("rope_type") == "llama3":
        factors = llama3_factors(config)
        yield _Tensor("rope_freqs.weight", tuple(factors.shape), "f32", lambda: factors)
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                stem, dot, kind = name.rpartition(".")
                place = names.get_name(stem)
                if place is None:
                    raise _cannot(f"the weight {name}", "GGUF has no name for it in this model type")
                shape = tuple(tensors.get_slice(name).get_shape())
                yield _Tensor(
                    f"{place}{dot}{kind}",
                    shape,
                    _format_of(shape, number_format),
                    _loader(file, name, layout, _num_heads(name, config)),
                )


def _format_of(shape: tuple[int, ...], number_format: NumberFormat) -> NumberFormat:
    if len(shape) == 1:
        return "f32"
    return "f16" if number_format == "q8_0" and shape[-1] % _Q8_BLOCK else number_format


def _num_heads(name: str, config: "PreTrainedConfig") -> int:
    """Whose rows are interleaved; 0 for any other weight."""
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else 0


def _loader(file: Path, name: str, layout: Layout, num_heads: int) -> "Callable[[], torch.Tensor]":
    def load() -> "torch.Tensor":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            weight = tensors.get_tensor(name)
        if layout.interleaves and num_heads:
            return interleave(weight, num_heads)
        return weight.float() + 1 if layout.adds_one and name.endswith("norm.weight") else weight

    return load


def interleave(weight: "torch.Tensor", num_heads: int) -> "torch.Tensor":
    """Rows 0, d/2, 1, d/2 + 1, ... of each head of d rows."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def gguf_name(number_format: NumberFormat) -> str:
    return f"model-{number_format}.gguf"
