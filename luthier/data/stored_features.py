"""What frozen encoders made of the media of rows, on disk: an epoch reads vectors in place of images.

A folder has a file for each kind, and the list of its samples:

    image.bin      (N, L, D) vectors of all samples, one after the other; L is 1 and the layers that are added deeper in
    samples.json   what the files hold, and where each sample lies

A *sample* is a conversation with its items (`luthier.data.pixels.Sample`). N vectors, D numbers each.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SAMPLES_FILE = "samples.json"


@dataclass(frozen=True, slots=True)
class Form:
    """How the encoder of a kind gives its vectors."""

    field: str
    """Of its output: `pooler_output` or `last_hidden_state`."""
    is_list: bool
    """Whether this is a list with a tensor for each item, or a single tensor."""
    dtype: str
    """As torch calls it: `bfloat16`."""
    num_layers: int
    width: int


def name_of(items: Sequence[str], blocks: Sequence[Sequence[int]]) -> str:
    """Under which a sample is found: a hash of its items and of the tokens that stand for them."""
    import numpy as np

    digest = hashlib.sha256(repr(tuple(items)).encode("utf-8", "surrogatepass"))
    for block in blocks:
        digest.update(np.asarray(block, np.int64).tobytes() + b"|")
    return digest.hexdigest()


@dataclass(frozen=True)
class StoredFeatures:
    """The features in `folder`. It can be sent to the worker processes of a data loader."""

    folder: Path

    @cached_property
    def _about(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / SAMPLES_FILE).read_text(encoding="utf-8"))
        return found

    @cached_property
    def forms(self) -> dict[str, Form]:
        """Kind -> how its encoder gives vectors."""
        return {kind: Form(**form) for kind, form in self._about["forms"].items()}

    @property
    def num_samples(self) -> int:
        return len(self._about["samples"])

    @property
    def num_bytes(self) -> int:
        return sum((self.folder / f"{kind}.bin").stat().st_size for kind in self.forms)

    def media(self, names: Sequence[str]) -> "dict[str, Tensor] | None":
        """Input -> values for these samples: `stored_image` (vectors, L, D), and what positions are computed from.

        None if one of them is not here.
        """
        import numpy as np
        import torch

        samples = self._about["samples"]
        if not all(name in samples for name in names):
            return None
        found: dict[str, Tensor] = {}
        for kind, form in self.forms.items():
            dtype: torch.dtype = getattr(torch, form.dtype)
            row = form.num_layers * form.width * dtype.itemsize
            file = np.memmap(self.folder / f"{kind}.bin", np.uint8, "r").reshape(-1, row)
            places = [samples[name]["places"].get(kind, (0, 0)) for name in names]
            taken = np.concatenate([file[start : start + count] for start, count in places])
            if len(taken):
                found[stored_name(kind)] = torch.from_numpy(taken).view(dtype).view(-1, form.num_layers, form.width)
        for name in names:
            for key, values in samples[name]["positions"].items():
                found[key] = torch.cat([*([found[key]] if key in found else []), torch.tensor(values)])
        return found


class FeatureWriter:
    """Writes such a folder, sample by sample."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._forms: dict[str, Form] = {}
        self._counts: dict[str, int] = {}
        self._samples: dict[str, Any] = {}

    def add(self, name: str, vectors: "Mapping[str, tuple[Form, Tensor]]", positions: "Mapping[str, Tensor]") -> None:
        """`vectors`: kind -> its form and (vectors, L, D)."""
        import torch

        places = {}
        for kind, (form, values) in vectors.items():
            assert self._forms.setdefault(kind, form) == form, "an encoder gives all its vectors in one form"
            start = self._counts.get(kind, 0)
            places[kind] = (start, len(values))
            self._counts[kind] = start + len(values)
            with (self._folder / f"{kind}.bin").open("ab") as file:
                file.write(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self._samples[name] = {
            "places": places,
            "positions": {key: values.tolist() for key, values in positions.items()},
        }

    def end(self) -> None:
        forms = {kind: asdict(form) for kind, form in self._forms.items()}
        about = {"forms": forms, "samples": self._samples}
        (self._folder / SAMPLES_FILE).write_text(json.dumps(about), encoding="utf-8")


def stored_name(kind: str) -> str:
    """The input of a batch with the stored features of a kind."""
    return f"stored_{kind}"
