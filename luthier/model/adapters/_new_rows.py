"""Rows of new tokens beside an adapter: trained, and saved with it, so that plain peft loads them too.

Where the number of rows stays, LoRA saves just those rows (peft's `trainable_token_indices`). Where it grows, the
embedding and the head are trained and saved in full (peft's `modules_to_save`), so the file itself says how many rows
there are; and so does OFT, of which peft cannot train single rows. The second embedding of Gemma 3n and Gemma 4 is far
larger than the first, so of that one LoRA saves only the rows that it has got.
"""

import copy
import re
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.core.log import info
from luthier.model.adapters._ties import settle_ties
from luthier.model.embeddings import NewRows, NewTokens, embedding_names, layer_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


def ties(model: "PreTrainedModel") -> bool:
    """Whether the output head is the embedding."""
    return bool(getattr(model.config, "tie_word_embeddings", False)) and model.get_output_embeddings() is not None


def add_rows(model: "PreTrainedModel", settings: "PeftConfig", rows: NewRows, key: str) -> None:
    """Change `settings` so that `rows` are trained and saved, in the embedding and in the head.

    `key`: where the targets were named, for the error. Raises `ModelError` where the adapter is to be put on the
    embedding or on the head itself.
    """
    import peft

    keys: Any = settings
    names, saved = embedding_names(model), list(keys.modules_to_save or ())
    trained: dict[str, list[int]] = getattr(keys, "trainable_token_indices", None) or {}
    left = [name for name in names if not _named(name, saved)]
    if rows or (len(left) < len(names) and ties(model)):
        _require_without_adapter(names, keys.target_modules, key)
    if rows:
        if len(left) < len(names) and ties(model) and isinstance(settings, peft.LoraConfig):
            left = []  # the one matrix is saved already
        if left and (rows.is_whole or not _takes_single_rows(model, settings)):
            endings = [name.rpartition(".")[2] for name in left]
            why = "the vocabulary may have grown" if rows.is_whole else "the model has never seen some tokens"
            info(f"{why}, so the embeddings are trained in full too: {', '.join(endings)}")
            keys.modules_to_save = [*saved, *endings]
            if isinstance(settings, peft.LoraConfig):
                settings.trainable_token_indices = None
        elif left:
            ends = left[:1] if ties(model) else left
            keys.trainable_token_indices = {name: sorted({*trained.get(name, ()), *rows.ids}) for name in ends}
            info(f"the rows of {len(rows.ids)} tokens that the model has never seen are trained: {', '.join(ends)}")
    _add_to_table(model, settings, rows, trained)
    if isinstance(settings, peft.LoraConfig) and ties(model):
        settings.ensure_weight_tying = any(_named(name, settings.modules_to_save or ()) for name in names)
        if settings.ensure_weight_tying:
            settings.modules_to_tie = settings.target_modules_to_tie = None  # as a config that is built with it


def _add_to_table(
    model: "PreTrainedModel", settings: "PeftConfig", rows: NewRows, trained: dict[str, list[int]]
) -> None:
    """Those of `layer_table`. `trained`: the rows by the name of their module that the adapter has trained before."""
    import peft

    keys: Any = settings
    table = layer_table(model)
    if table is None:
        return
    name = next(name for name, module in model.named_modules() if module is table)
    ids = sorted({*trained.get(name, ()), *rows.in_table})
    if not ids or _named(name, keys.modules_to_save or ()):
        return
    if isinstance(settings, peft.LoraConfig) and rows.trains_single:
        keys.trainable_token_indices = {**(keys.trainable_token_indices or {}), name: ids}
        info(f"the rows of {len(ids)} tokens are trained there too: {name}")
    else:
        keys.modules_to_save = [*(keys.modules_to_save or ()), name.rpartition(".")[2]]
        info(f"the vocabulary has grown, so this is trained in full too: {name}")


def with_new_rows(adapted: "PeftModel", new_tokens: NewTokens, *, pure_bf16: bool) -> "PeftModel":
    """The same adapter, which from now on also trains and saves the rows of `new_tokens`.

    What it has trained itself becomes a part of the model, with the new rows, and is put under training again.
    Raises `ModelError` as `add_rows` does.
    """
    import peft
    from peft.utils.other import TrainableTokensWrapper

    settings: Any = copy.deepcopy(adapted.peft_config["default"])
    state = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for wrapper in adapted.modules():
        if isinstance(wrapper, TrainableTokensWrapper):
            wrapper.token_adapter.merge()
    model = adapted.unload()
    settle_ties(model)
    add_rows(model, settings, new_tokens.give_rows(model), "adapter_name_or_path")
    again = peft.get_peft_model(model, settings, autocast_adapter_dtype=not pure_bf16)
    fresh = peft.get_peft_model_state_dict(again, save_embedding_layers=False)
    prefix = str(again.base_model.prefix)
    peft.set_peft_model_state_dict(again, {**fresh, **{k: v for k, v in state.items() if f".{prefix}" in k}})
    return again


def _takes_single_rows(model: "PreTrainedModel", settings: "PeftConfig") -> bool:
    """peft computes with a plain matrix where it trains single rows of it, and knows a tie from the config only."""
    import peft
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(settings, peft.LoraConfig) or not isinstance(embedding, torch.nn.Embedding):
        return False
    if head is None:
        return True
    return type(head) is torch.nn.Linear and head.bias is None and (head.weight is embedding.weight) == ties(model)


def _named(name: str, endings: "Iterable[str]") -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _require_without_adapter(names: tuple[str, ...], targets: "Iterable[str] | str | None", key: str) -> None:
    for name in names:
        if re.fullmatch(targets, name) if isinstance(targets, str) else _named(name, targets or ()):
            ending = name.rpartition(".")[2]
            first = "set create_new_adapter: true, and " if key == "adapter_name_or_path" else ""
            raise ModelError(
                f"{key}: {ending}: an adapter cannot be put on what is trained itself, be it for additional_target or"
                f" for tokens that the model has never seen -> {first}leave {ending} out of lora_target"
            )
