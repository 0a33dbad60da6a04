"""Insert blocks that are the identity at first, so that `use_llama_pro` can train them (LLaMA Pro)."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import ModelError
from luthier.core.files import save_folder_atomically
from luthier.core.log import info

if TYPE_CHECKING:
    import torch


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="luthier expand", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a folder, a GGUF file or a hub id")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--blocks", type=int, required=True, metavar="N", help="how many blocks; must divide the number of layers"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the model repository brings along"
    )
    words = parser.parse_args(argv)
    folder = expand(words.model, Path(words.out).expanduser(), words.blocks, trust_remote_code=words.trust_remote_code)
    print(f"expanded: {folder}")
    return 0


def expand(model_name: str, out: Path, num_blocks: int, *, trust_remote_code: bool = False) -> Path:
    """Write the expanded model, load it again and compare its logits with those before. Returns the folder.

    Raises `ModelError` if the model cannot be expanded; then nothing is written.
    """
    import torch

    from luthier.core.machine import detect
    from luthier.model.attention import resolve_attention
    from luthier.model.classes import checkpoint_dtype, model_class
    from luthier.model.files.sources import ModelSource
    from luthier.model.llama_pro import expand_blocks
    from luthier.model.loading.config import load_config
    from luthier.model.loading.load import load_model
    from luthier.model.save import incomplete, num_bytes, write_model
    from luthier.model.tokenizer import load_tokenizer
    from luthier.workflow.export import check_target

    check_target(out, model_name, (), key="expand")
    source = ModelSource(model_name, trust_remote_code=trust_remote_code)
    config = load_config(source)
    dtype = checkpoint_dtype(config) or torch.float32
    kind = model_class(config)
    attention = resolve_attention("auto", config=config, model_class=kind, dtype=dtype, machine=detect())
    model = load_model(source, config=config, dtype=dtype, attn_implementation=attention.implementation)
    before = logits(model)
    places = expand_blocks(model, num_blocks)
    tokenizer = load_tokenizer(source)
    with save_folder_atomically(out, needed_bytes=num_bytes(model)) as draft:
        if unsaved := write_model(draft, model, tokenizer):
            raise incomplete(out, unsaved, model_name)
        num_layers = model.config.get_text_config().num_hidden_layers
        del model
        try:
            written = replace(source, name=str(draft))
            after = logits(load_model(written, dtype=dtype, attn_implementation=attention.implementation))
        except ModelError as fault:
            raise ModelError(
                f"{model_name}: its config derives the kind of each layer from a rule that does not fit"
                f" {num_blocks} more layers ({fault}) -> choose another number of blocks"
            ) from fault
        if not torch.equal(before, after):
            difference = float((before.float() - after.float()).abs().max())
            raise ModelError(
                f"{model_name}: the expanded model gives other answers (logits differ by {difference:.2g})"
            )
    info(f"{num_layers} layers, of which {', '.join(map(str, places))} are new; the logits of a test text are the same")
    info(f"train them with use_llama_pro: true and freeze_trainable_layers: {num_blocks}")
    return out


def logits(model: "torch.nn.Module") -> "torch.Tensor":
    import torch

    from luthier.model.llama_pro import probe_ids

    with torch.no_grad():
        found: torch.Tensor = model(input_ids=probe_ids(model), use_cache=False).logits  # type: ignore[arg-type]
    return found
