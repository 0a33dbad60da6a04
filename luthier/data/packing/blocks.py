"""Plain texts, concatenated and cut into blocks of equal length (pt)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from luthier.data.rows.arrow import batches_of, list_array
from luthier.data.rows.columns import IDS, SEQUENCE, Column
from luthier.data.rows.table import Table

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Blocks:
    """Cuts the concatenation of all texts; tokens that do not fill the last block are dropped."""

    size_tokens: int
    first_token_id: int | None = None
    """Written over the first token of every block, for tokenizers that open each text with a begin token."""
    columns: ClassVar[tuple[Column, ...]] = SEQUENCE
    cuts_rows: ClassVar[bool] = True
    is_optional: ClassVar[bool] = True

    def join(self, rows: Table) -> "Iterator[Sequence[pa.ListArray]]":
        """Blocks of exactly `size_tokens` ids, all of them targets."""
        import numpy as np

        pending = np.zeros(0, dtype=np.int32)
        for values, _ in batches_of(rows, IDS.name):
            pending = np.concatenate([pending, values])
            num_blocks = len(pending) // self.size_tokens
            if num_blocks:
                blocks = pending[: num_blocks * self.size_tokens].reshape(num_blocks, self.size_tokens)
                pending = pending[num_blocks * self.size_tokens :]
                if self.first_token_id is not None:
                    blocks[:, 0] = self.first_token_id
                array = list_array(blocks.reshape(-1), np.full(num_blocks, self.size_tokens))
                yield array, array
