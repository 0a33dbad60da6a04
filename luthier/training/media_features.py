"""`cache_media_features`: what frozen encoders make of the media of all rows, computed once before training and cached
by content, so that no epoch and no later run computes it again.

A cache entry belongs to these files (by path, size and time of change), the settings of their processor, the weights of
the encoder and the number format. Other rows with the same media, such as those of another stage, read the same entry.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.core.errors import InvalidInput, ModelError
from luthier.core.files import size
from luthier.core.log import info, warn
from luthier.data.cache.eviction import limit_bytes
from luthier.data.cache.fingerprint import code_digest, joint_key
from luthier.data.media.kinds import states_of
from luthier.data.pixels import Pixels, Sample, samples_of
from luthier.data.rows.columns import IMAGES
from luthier.data.rows.table import Table
from luthier.data.shared_media import positions_of
from luthier.data.stored_features import FeatureWriter, Form, StoredFeatures
from luthier.model.media.towers import encoder_digest, encoders_learn, features_by_sample
from luthier.model.modules import unwrap
from luthier.training.arguments import autocast_of
from luthier.training.distributed.sums import to_device

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

    from luthier.data.cache.store import Cache

FEATURES_CODE = (
    *("data/pixels.py", "data/shared_media.py", "data/stored_features.py", "model/media/towers.py"),
    "training/media_features.py",
)
"""The code that computes features, as a part of their cache key."""
NO_MEDIA = "cache_media_features has no effect: no row of this run has media"


@dataclass(frozen=True, slots=True)
class FeatureKeeper:
    """Computes the features of rows before training, or finds them in the cache."""

    model: "nn.Module"
    pixels: Pixels
    processor_digest: str
    args: "TrainingArguments"
    cache: "Cache"

    def keep(self, tables: Iterable[Table], others: "dict[str, nn.Module]") -> Pixels:
        """`pixels` that read the features of the media in these rows. `others`: models that get the same batches.

        Raises `ModelError` if these features change in training, or are those of another model, and `InvalidInput` if
        they take more than the cache may.
        """
        learning = encoders_learn(unwrap(self.model))
        if learning is not None:
            raise ModelError(
                f"cache_media_features: {learning} learns, so the features of images change in training -> leave"
                " cache_media_features out, or freeze what encodes images"
            )
        digest = encoder_digest(unwrap(self.model))
        for name, other in others.items():
            if encoder_digest(unwrap(other)) != digest:
                raise ModelError(
                    f"cache_media_features: the {name} model has its own encoder -> leave cache_media_features out"
                )
        samples = list(dict.fromkeys(_samples(tables)))
        if not samples:
            warn(NO_MEDIA)
            return self.pixels
        names = sorted(sample.name for sample in samples)
        files = sorted({item for sample in samples for item in sample.items})
        state = hashlib.sha256(repr([(item, states_of(item)) for item in files]).encode()).hexdigest()
        how = (self.args.bf16, self.args.fp16, self.args.eval_batch_size)
        key = joint_key("features", code_digest(FEATURES_CODE), digest, self.processor_digest, names, state, how)
        stored = StoredFeatures(self.cache.entry(key, lambda folder: self._write(samples, folder)))
        info(f"features of {stored.num_samples} samples with media: {size(stored.num_bytes)} in {stored.folder}")
        return replace(self.pixels, stored=stored, stands_in=False)

    def _write(self, samples: Sequence[Sample], folder: Path) -> None:
        model = self.model.to(self.args.device)
        base, was_training = unwrap(model), model.training
        model.eval()
        writer, rest, is_first = FeatureWriter(folder), iter(samples), True
        with torch.no_grad(), autocast_of(self.args, base):
            while chosen := list(islice(rest, self.args.eval_batch_size)):
                found = self._features(base, chosen)
                if is_first:
                    _require_room(found, chosen, samples, self.pixels)
                is_first = False
                for sample, (vectors, positions) in zip(chosen, found, strict=True):
                    writer.add(sample.name, vectors, positions)
        writer.end()
        model.train(was_training)

    def _features(self, base: Any, samples: Sequence[Sample]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """For each sample: kind -> its form and its vectors (n, L, D); and what its positions are computed from."""
        media = self.pixels.inputs_of(samples)
        sharing = self.pixels.sharing(samples, range(len(samples)))
        by_sample = features_by_sample(base, to_device(media, self.args.device), sharing)
        found = []
        for number in range(len(samples)):
            vectors = {kind: (_form(one), one.vectors) for kind, one in by_sample[number].items()}
            found.append((vectors, positions_of(media, replace(sharing, order=(number,)))))
        return found


def _form(one: Any) -> Form:
    dtype = str(one.vectors.dtype).removeprefix("torch.")
    return Form(one.field, one.is_list, dtype, one.vectors.shape[1], one.vectors.shape[2])


def _samples(tables: Iterable[Table]) -> Iterable[Sample]:
    for table in tables:
        if IMAGES.name in table.column_names:
            for number in range(len(table)):
                yield from (sample for sample in samples_of(table[number]) if sample.items)


def _require_room(
    found: Sequence[tuple[dict[str, Any], Any]], chosen: Sequence[Sample], samples: Sequence[Sample], pixels: Pixels
) -> None:
    """Say how large the features of all samples will be. Raises `InvalidInput` if the cache is smaller."""
    counts, of_first = pixels.sharing(samples, ()).vectors, pixels.sharing(chosen, ()).vectors
    needed = 0.0
    for kind, numbers in counts.items():
        firsts = [vectors[kind][1] for vectors, _ in found if kind in vectors]
        bytes_of_first = sum(values.numel() * values.element_size() for values in firsts)
        needed += bytes_of_first / max(sum(of_first.get(kind, (0,))), 1) * sum(numbers)
    info(f"cache_media_features: computing the features of {len(samples)} samples once: {size(needed)}")
    if needed > limit_bytes():
        raise InvalidInput(
            f"cache_media_features: the features of {len(samples)} samples take {size(needed)}, and the cache may take"
            f" {size(limit_bytes())} -> raise LUTHIER_CACHE_GB, or leave cache_media_features out"
        )
