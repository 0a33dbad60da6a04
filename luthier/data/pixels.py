"""From the images of rows to the tensors that a model takes beside its tokens, when a batch is made.

Token ids hold each image as a block already (`luthier.data.media.blocks`), so the processor is called with marks alone:

    processor(text=["<image><image>", "<image>"], images=[[a, b], [c]])

What it writes for each mark must be the block that stands in the row. If it is another one, the file has changed since
the rows were prepared.

B sequences, T tokens of the longest, N tokens in total, S samples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError, RowError
from luthier.data.media.reader import Size, former_size, load_image
from luthier.data.rows.columns import parts_of
from luthier.data.rows.labels import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor
    from transformers import ProcessorMixin

TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")
"""What a processor returns of the text; all else is for the model."""
SMALLEST_SIDE = 28
"""Height and width of the image that stands in for one, in pixels."""


@dataclass(frozen=True)
class Pixels:
    """How a batch gets what its model sees. It can be sent to the worker processes of a data loader."""

    processor: "ProcessorMixin"
    mark: str
    """Stands for one image in a text."""
    token_types: str | None = None
    """The argument of the model that tells tokens of text and of images apart."""
    positions: "Callable[[Mapping[str, Any]], Tensor] | None" = None
    """`luthier.model.positions.RopeIndex`, if the positions of the model have several axes."""
    dtype: "torch.dtype | None" = None
    """Of the weights, for pixels that the processor gives in 16 bits (that of Llama 4 does)."""
    stands_in: bool = False
    """Whether a batch without an image gets one, since several processes train or share the weights that see."""

    def inputs(self, rows: Sequence[Mapping[str, Any]]) -> "dict[str, Tensor]":
        """What the model takes for the images of these rows, in their order; empty if there are none.

        Raises `DataError` for a file that cannot be read, or that has changed since the rows were prepared.
        """
        samples = [sample for row in rows for sample in samples_of(row) if sample.paths]
        if not samples:
            return {}
        images = [[_opened(path) for path in sample.paths] for sample in samples]
        found, written = self.processed(images)
        for sample, opened, texts in zip(samples, images, written, strict=True):
            self._require_same(sample, opened, texts)
        return found

    def processed(self, images: "Sequence[Sequence[Image]]") -> "tuple[dict[str, Tensor], list[list[str]]]":
        """(what the model takes, what the processor writes for each image of each sample)."""
        found = self.processor(
            text=[self.mark * len(some) for some in images],
            images=[list(some) for some in images],
            images_kwargs={"return_tensors": "pt"},
            text_kwargs={"return_tensors": None},  # rows have different numbers of images
            return_text_replacement_offsets=True,
        )
        written = [[piece["replacement"] for piece in pieces] for pieces in found["text_replacement_offsets"]]
        media = {name: self._fitting(value) for name, value in found.items() if name not in TEXT_KEYS}
        return media, written

    def _fitting(self, values: "Tensor") -> "Tensor":
        is_half = values.is_floating_point() and values.element_size() < 4
        return values.to(self.dtype) if is_half and self.dtype is not None else values

    def _require_same(self, sample: "Sample", images: "Sequence[Image]", written: Sequence[str]) -> None:
        for path, image, block, text in zip(sample.paths, images, sample.blocks, written, strict=True):
            before, now = self._named(block), self._named(self.ids(text))
            if not _is_within(now, before):
                former = former_size(path)
                raise DataError(
                    f"{path}: this image has changed since the rows were prepared: it is now"
                    f" {_described((image.height, image.width), len(now))}, and was {_described(former, len(before))}"
                    " -> run again: the rows are prepared once more"
                )

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _named(self, ids: Sequence[int]) -> list[int]:
        """Those tokens that no neighbor can change, in contrast to line breaks at the ends of a block."""
        return [token for token in ids if token in self._named_tokens]

    @cached_property
    def _named_tokens(self) -> frozenset[int]:
        return frozenset(self.processor.tokenizer.get_added_vocab().values())

    @cached_property
    def _substitute(self) -> "tuple[dict[str, Tensor], list[int]]":
        """(what the model takes, token ids) for a small black image."""
        from PIL import Image

        found, written = self.processed([[Image.new("RGB", (SMALLEST_SIDE, SMALLEST_SIDE))]])
        return found, self.ids(written[0][0])

    @cached_property
    def placeholders(self) -> list[int]:
        """The tokens that stand for what is no text. The model takes one of them for each vector of an image."""
        kinds = (getattr(self.processor, f"{kind}_token_ids") for kind in ("image", "video", "audio"))
        return sorted({token for ids in kinds for token in ids if token is not None})

    def stand_in(self) -> dict[str, list[int]]:
        """A row with one small image and without labels, which changes no loss."""
        _, ids = self._substitute
        return {"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids)}

    def stand_in_inputs(self) -> "dict[str, Tensor]":
        return self._substitute[0]

    def token_inputs(self, batch: Mapping[str, Any], media: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """What the model takes for each token: its type, and its positions where rows are concatenated.

        `media`: the inputs for all images in `batch`.
        """
        import torch

        ids = batch["input_ids"]
        found = {}
        types = None
        if self.token_types is not None:
            types = torch.tensor(self.processor.create_mm_token_type_ids(ids.tolist()))
            found[self.token_types] = types
        if self.positions is not None and "cu_seq_lens_q" in batch:
            found["position_ids"] = self._axes(batch, types, media)
        return found

    def _axes(self, batch: Mapping[str, Any], types: "Tensor | None", media: "Mapping[str, Tensor]") -> "Tensor":
        """(1 + axes, 1, N): positions within the sample, as for text, and on each axis."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        assert self.positions is not None, "asked for models whose positions have several axes"
        lengths = batch["cu_seq_lens_q"].diff().tolist()
        named = {"input_ids": batch["input_ids"][0]} | ({} if types is None else {str(self.token_types): types[0]})
        padded = {name: pad_sequence(values.split(lengths), batch_first=True) for name, values in named.items()}
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        axes = self.positions({**padded, **media, "attention_mask": mask.long()})
        return torch.cat([batch["position_ids"][None], axes[:, mask][:, None]])


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of answers that a model generates, with their images."""

    pixels: Pixels
    rows: Sequence[Mapping[str, Any]]
    """With `input_ids`, `images` and `blocks`."""

    def inputs(self, chosen: Sequence[int], input_ids: "Tensor") -> "dict[str, Tensor]":
        """What the model takes beside `input_ids` (B, T): the `chosen` prompts, padded on the left."""
        media = self.pixels.inputs([self.rows[number] for number in chosen])
        return {**media, **self.pixels.token_inputs({"input_ids": input_ids}, media)}


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation: its images, and the token ids that stand for each."""

    paths: tuple[str, ...]
    blocks: tuple[list[int], ...]


def samples_of(row: Mapping[str, Any]) -> Iterator[Sample]:
    """The samples of a row, of which a packed row has several. Images belong to all parts of a row alike."""
    part = parts_of(row)[0]
    ids, bounds = row[part + "input_ids"], row[part + "blocks"]
    places = list(zip(bounds[::2], bounds[1::2], strict=True))
    ends = accumulate(row.get(part + "sample_lengths") or [len(ids)])
    for start, end in pairwise((0, *ends)):
        mine = [number for number, (first, _) in enumerate(places) if start <= first < end]
        yield Sample(
            tuple(row["images"][number] for number in mine), tuple(list(ids[slice(*places[number])]) for number in mine)
        )


def _opened(path: str) -> "Image":
    try:
        return load_image(path)
    except (OSError, RowError) as fault:
        raise DataError(
            f"{path}: this image could be read when the rows were prepared, and cannot now: {fault}"
        ) from None


def _described(size: Size | None, num_tokens: int) -> str:
    pixels = "" if size is None else f"{size[0]}x{size[1]} pixels and "
    return f"{pixels}{num_tokens} tokens"


def _is_within(block: Sequence[int], row: Sequence[int]) -> bool:
    """Whether `block` stands in `row`, and no token of it outside."""
    places = (
        start for start in range(len(row) - len(block) + 1) if list(row[start : start + len(block)]) == list(block)
    )
    start = next(places, None)
    if start is None:
        return False
    around = (*row[:start], *row[start + len(block) :])
    return not set(around) & set(block)
