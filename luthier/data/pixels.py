"""From the media of rows (images, videos and audio) to what a model takes beside its tokens, when a batch is made.

Token ids hold each item as a block already (`luthier.data.media.blocks`), so the processor is called with marks alone:

    processor(text=["<image><image>", "<image>"], images=[[a, b], [c]])

What it writes for each mark must be the block that stands in the row. If it is another one, the file has changed since
the rows were prepared.

B sequences, T tokens of the longest, N tokens in total, S samples.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError, RowError
from luthier.data.chat.parts import around_item
from luthier.data.media.kinds import (
    Loaded,
    Shape,
    arguments_for,
    kind_of,
    listens_to_videos,
    load,
    marks_of,
    media_kind,
    path_in,
)
from luthier.data.rows.columns import parts_of
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.data.shared_media import NOTHING, Sharing, shared_inputs
from luthier.data.stored_features import StoredFeatures, name_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import ProcessorMixin

TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")
"""What a processor returns of the text; all else is for the model."""
SOUND_OF_VIDEOS = "use_audio_in_video"
"""The argument of a model that hears its videos: whether those of the batch have their sound among their frames."""
SMALLEST: Mapping[str, Shape] = {
    "image": Shape("image", (28, 28)),
    "video": Shape("video", (56, 56, 2, 2.0, 1.0, 0, 0, 1)),
    "audio": Shape("audio", (4_000, 16_000)),
}
"""What stands in for an item of a kind."""


@dataclass(frozen=True)
class Pixels:
    """How a batch gets what its model sees. It can be sent to the worker processes of a data loader."""

    processor: "ProcessorMixin"
    kinds: tuple[str, ...] = ("image",)
    """Of the media that rows may have."""
    token_types: str | None = None
    """The argument of the model that tells tokens of text and of media apart."""
    positions: "Callable[[Mapping[str, Any]], Tensor] | None" = None
    """`luthier.model.media.positions.RopeIndex`, if the positions of the model have several axes."""
    dtype: "torch.dtype | None" = None
    """Of the weights, for pixels that the processor gives in 16 bits (that of Llama 4 does)."""
    stands_in: bool = False
    """Whether a batch without an item of a kind gets one, since several processes train or share the weights that see
    or hear."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Kind -> the token that the model replaces by a vector. In Llama 4 it is not that of the processor."""
    shares: bool = False
    """Whether the model computes the media of equal samples of a batch once (`luthier.model.media.towers`)."""
    stored: StoredFeatures | None = None
    """Features of media that are read in place of files."""

    def inputs(self, rows: Sequence[Mapping[str, Any]]) -> "dict[str, Tensor]":
        """What the model takes for the items of these rows, in their order; empty if there are none.

        Raises `DataError` for a file that cannot be read, or that has changed since the rows were prepared.
        """
        return self.inputs_of([sample for row in rows for sample in samples_of(row) if sample.items])

    def inputs_of(self, samples: "Sequence[Sample]") -> "dict[str, Tensor]":
        """The same for these samples."""
        if not samples:
            return {}
        loaded = [[self._opened(item) for item in sample.items] for sample in samples]
        try:
            found, written = self.processed(loaded)
        except ValueError as fault:
            names = ", ".join(dict.fromkeys(path_in(item) for sample in samples for item in sample.items))
            raise DataError(
                f"{type(self.processor).__name__} cannot put these files into one batch: {names}:"
                f" {' '.join(str(fault).partition('You can try')[0].split())} -> set per_device_train_batch_size: 1"
            ) from fault
        for sample, opened, texts in zip(samples, loaded, written, strict=True):
            self._require_same(sample, opened, texts)
        return found

    def shared(self, rows: Sequence[Mapping[str, Any]], num_parts: int) -> "tuple[dict[str, Tensor], Sharing] | None":
        """(the inputs for the distinct samples, which sequence shows which). Each row is `num_parts` sequences, and the
        parts of all rows come one after the other. None if all samples differ, or if the model cannot share.

        Raises `DataError` as `inputs` does.
        """
        if not self.shares:
            return None
        numbers: dict[Sample, int] = {}
        samples = [sample for row in rows for sample in samples_of(row)]
        order = [
            numbers.setdefault(sample, len(numbers)) if sample.items else NOTHING for sample in samples
        ] * num_parts
        media = self._read(numbers)
        if media is not None and self.stored is not None:
            return media, replace(self.sharing(list(numbers), order), stored=self.stored.forms)
        if len(numbers) == len(order) - order.count(NOTHING):
            return None
        return self.inputs_of(list(numbers)), self.sharing(list(numbers), order)

    def _read(self, samples: "Iterable[Sample]") -> "dict[str, Tensor] | None":
        """The stored features of samples; None if there are none."""
        names = [sample.name for sample in samples] if self.stored is not None else []
        return self.stored.media(names) if self.stored is not None and names else None

    def sharing(self, samples: "Sequence[Sample]", order: Sequence[int]) -> Sharing:
        """`samples`: the distinct ones. `order`: which of them each sequence shows."""
        kinds = dict.fromkeys(kind_of(item).name for sample in samples for item in sample.items)
        items = {name: tuple(len(sample.blocks_of(name)) for sample in samples) for name in kinds}
        vectors = {name: tuple(self._num_vectors(sample, name) for sample in samples) for name in kinds}
        return Sharing(tuple(order), items, vectors)

    def _num_vectors(self, sample: "Sample", kind: str) -> int:
        """How many tokens of a sample stand for a vector of its items of a kind; GLM-4V writes videos with the token of
        images."""
        own, image = (self.tokens.get(name) for name in (kind, "image"))
        return sum(block.count(own) or block.count(image) for block in sample.blocks_of(kind))

    def processed(self, samples: Sequence[Sequence[Loaded]]) -> "tuple[dict[str, Tensor], list[list[str]]]":
        """(what the model takes, what the processor writes for each item of each sample)."""
        import torch

        marks = marks_of(self.processor)
        given = arguments_for(samples, self.processor)
        found = self.processor(
            text=["".join(marks[loaded.kind] for loaded in sample) for sample in samples],
            text_kwargs={"return_tensors": None},  # rows have different numbers of items
            return_text_replacement_offsets=True,
            **given,
        )
        written = [[piece["replacement"] for piece in pieces] for pieces in found["text_replacement_offsets"]]
        media = {name: self._fitting(value) for name, value in found.items() if name not in TEXT_KEYS}
        if given.get("load_audio_from_video"):
            media[SOUND_OF_VIDEOS] = torch.tensor(True)
        return media, written

    def _fitting(self, given: "Tensor | list[float]") -> "Tensor":
        import torch

        values = torch.as_tensor(given)  # the seconds between frames are a list
        is_half = values.is_floating_point() and values.element_size() < 4
        return values.to(self.dtype) if is_half and self.dtype is not None else values

    def _opened(self, item: str) -> Loaded:
        try:
            return load(item, self.processor)
        except (OSError, RowError) as fault:
            raise DataError(
                f"{path_in(item)}: this {kind_of(item).one} could be read when the rows were prepared, and cannot now:"
                f" {fault}"
            ) from None

    def _require_same(self, sample: "Sample", loaded: Sequence[Loaded], written: Sequence[str]) -> None:
        for item, own, block, text in zip(sample.items, loaded, sample.blocks, written, strict=True):
            before, now = self._named(block), self._named(self.ids(text))
            if not _is_within(now, before, self.placeholders):
                kind, former = kind_of(item), kind_of(item).former(path_in(item))
                was = "" if former is None else f"{kind.shown(former)}{kind.unit} and "
                raise DataError(
                    f"{path_in(item)}: this {kind.one} has changed since the rows were prepared: it is now"
                    f" {kind.of_loaded(own.content)} and {len(now)} tokens, and was {was}{len(before)} tokens"
                    " -> run again: the rows are prepared once more"
                )

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def framed(self, name: str, block: str) -> list[int]:
        """The token ids of a block with what the chat template of the model writes around it: GLM-4V tells images and
        videos apart by that."""
        tokenizer = self.processor.tokenizer
        mark = marks_of(self.processor)[name]
        around = around_item(tokenizer, str(tokenizer.chat_template), name, mark) if tokenizer.chat_template else None
        before, after = around or ("", "")
        return self.ids(before + block + after)

    def _named(self, ids: Sequence[int]) -> list[int]:
        """Those tokens that no neighbor can change, in contrast to line breaks at the ends of a block."""
        return [token for token in ids if token in self._named_tokens]

    @cached_property
    def _named_tokens(self) -> frozenset[int]:
        return frozenset(self.processor.tokenizer.get_added_vocab().values())

    @cached_property
    def _substitutes(self) -> "dict[str, tuple[dict[str, Tensor], list[int]]]":
        """Kind -> (what the model takes, token ids) for a small item without content."""
        found = {}
        for name in self.kinds:
            blank = media_kind(name).blank(SMALLEST[name].size, self.processor)
            tensors, written = self.processed([[Loaded(name, blank)]])
            found[name] = tensors, self.framed(name, written[0][0])
        return found

    @cached_property
    def placeholders(self) -> list[int]:
        """The tokens that stand for what is no text. The model takes one of them for each vector of an item."""
        kinds = (getattr(self.processor, f"{kind}_token_ids") for kind in ("image", "video", "audio"))
        return sorted({token for ids in (*kinds, self.tokens.values()) for token in ids if token is not None})

    def missing(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """The kinds of which these rows have no item, and need one."""
        if not self.stands_in:
            return []
        present = {kind_of(item).name for row in rows for item in row["images"]}
        if "video" in present and listens_to_videos(self.processor):
            present.add("audio")
        return [name for name in self.kinds if name not in present]

    def stand_in(self, name: str) -> dict[str, list[int]]:
        """A row with one small item and without labels, which changes no loss."""
        _, ids = self._substitutes[name]
        return {"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids)}

    def stand_in_inputs(self, name: str) -> "dict[str, Tensor]":
        return self._substitutes[name][0]

    def token_inputs(self, batch: Mapping[str, Any], media: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """What the model takes for each token: its type, and its positions where rows are concatenated.

        `media`: the inputs for all items in `batch`.
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
    """The prompts of answers that a model generates, with their media."""

    pixels: Pixels
    rows: Sequence[Mapping[str, Any]]
    """With `input_ids`, `images` and `blocks`."""

    def inputs(self, chosen: Sequence[int], input_ids: "Tensor") -> dict[str, Any]:
        """What the model takes beside `input_ids` (B, T): the `chosen` prompts, padded on the left."""
        rows = [self.rows[number] for number in chosen]
        shared = self.pixels.shared(rows, 1)
        media = self.pixels.inputs(rows) if shared is None else shared_inputs(*shared)
        return {**media, **self.pixels.token_inputs({"input_ids": input_ids}, media)}


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation: its items, and the token ids that stand for each."""

    items: tuple[str, ...]
    blocks: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        """Under which its features are stored."""
        return name_of(self.items, self.blocks)

    def blocks_of(self, kind: str) -> list[tuple[int, ...]]:
        return [block for item, block in zip(self.items, self.blocks, strict=True) if kind_of(item).name == kind]


def samples_of(row: Mapping[str, Any]) -> Iterator[Sample]:
    """The samples of a row, of which a packed row has several. Items belong to all parts of a row alike."""
    part = parts_of(row)[0]
    ids, bounds = row[part + "input_ids"], row[part + "blocks"]
    places = list(zip(bounds[::2], bounds[1::2], strict=True))
    ends = accumulate(row.get(part + "sample_lengths") or [len(ids)])
    for start, end in pairwise((0, *ends)):
        mine = [number for number, (first, _) in enumerate(places) if start <= first < end]
        yield Sample(
            tuple(row["images"][number] for number in mine),
            tuple(tuple(ids[slice(*places[number])]) for number in mine),
        )


def _is_within(block: Sequence[int], row: Sequence[int], placeholders: Collection[int]) -> bool:
    """Whether `block` stands in `row`, and none of its placeholders outside."""
    places = (
        start for start in range(len(row) - len(block) + 1) if list(row[start : start + len(block)]) == list(block)
    )
    start = next(places, None)
    if start is None:
        return False
    around = (*row[:start], *row[start + len(block) :])
    own = set(block).intersection(placeholders) or set(block)
    return not set(around) & own
