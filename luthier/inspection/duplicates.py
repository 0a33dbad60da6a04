"""Duplicate rows: exact ones by a digest, near ones by MinHash and locality-sensitive hashing.

The similarity of two texts is the Jaccard index |A and B| / |A or B| of their sets of word triples (estimated with 128
permutations: Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900; searched with the library `datasketch`). Only
letters are compared, in lower case; each Chinese or Japanese character counts as a word.
"""

import re
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any
from zlib import crc32

from luthier.core.versions import require
from luthier.data.chat.answers import flat_text
from luthier.data.types import Example, Preference
from luthier.inspection.doctor import Place, Sample, Split

NEAR = 0.85
"""Texts with at least this similarity are near duplicates."""
NUM_PERMUTATIONS = 128
WORDS_PER_SHINGLE = 3
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


class ExactDuplicates:
    """The first place of every distinct row, by split."""

    def __init__(self) -> None:
        self._first: dict[Split, dict[bytes, Place]] = {"train": {}, "eval": {}}

    def note(self, sample: Sample) -> None:
        """Fill in `sample.duplicates` and remember the row."""
        digest = blake2b(repr(sample.example).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        found = {split: first[digest] for split, first in self._first.items() if digest in first}
        # A row that is sampled twice, or a dataset that is named twice, is not a duplicate in the data.
        sample.duplicates = {s: p for s, p in found.items() if s != sample.split or p != sample.place}
        self._first[sample.split].setdefault(digest, sample.place)


class NearDuplicates:
    """An index of all rows so far, by split. Raises `MissingExtra` without the library `datasketch`."""

    def __init__(self) -> None:
        library = require("datasketch", "doctor", "looking for near duplicates")
        self._blank = library.MinHash(num_perm=NUM_PERMUTATIONS, hashfunc=crc32)
        self._index: dict[Split, Any] = {
            split: library.MinHashLSH(threshold=NEAR, num_perm=NUM_PERMUTATIONS) for split in ("train", "eval")
        }
        self._known: dict[Split, list[tuple[Place, Any]]] = {"train": [], "eval": []}

    def note(self, sample: Sample) -> None:
        """Fill in `sample.near` and remember the row, unless it is an exact duplicate."""
        assert sample.example is not None, "rows without an example are not compared"
        shingles = set(_shingles(sample.example))
        if not shingles:
            return
        sketch = self._blank.copy()
        sketch.update_batch([shingle.encode() for shingle in shingles])
        sample.near = dict(self._nearest(sketch))
        if sample.split not in sample.duplicates:
            known = self._known[sample.split]
            self._index[sample.split].insert(len(known), sketch)
            known.append((sample.place, sketch))

    def _nearest(self, sketch: Any) -> Iterator[tuple[Split, tuple[Place, float]]]:
        for split, index in self._index.items():
            known = self._known[split]
            shares = [(known[number][1].jaccard(sketch), number) for number in index.query(sketch)]
            share, number = max(shares, default=(0.0, -1), key=lambda pair: (pair[0], -pair[1]))
            if share >= NEAR:
                yield split, (known[number][0], share)


def _shingles(example: Example) -> Iterator[str]:
    """Every three consecutive words of the messages; a shorter text is one shingle."""
    if isinstance(example, Preference):
        messages = (*example.prompt, example.chosen, example.rejected)
    else:
        messages = example.messages
    media = "".join(example.media.items)  # the same question about another image is another row
    texts = (flat_text(message, with_thought=True) for message in messages)
    words = [word for text in texts for word in _WORD.findall(text.lower())]
    for start in range(max(len(words) - WORDS_PER_SHINGLE + 1, min(len(words), 1))):
        yield media + " ".join(words[start : start + WORDS_PER_SHINGLE])
