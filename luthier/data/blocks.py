"""Plain texts laid behind one another and cut into blocks of equal length (pt)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from luthier.data.labels import Encoded


@dataclass(slots=True)
class Blocks:
    """Cuts a stream of encoded texts; what does not fill the last block is left over and counted."""

    size_tokens: int
    first_token_id: int | None = None
    """Written over the first token of every block, for tokenizers that open each text with a begin token."""
    num_leftover_tokens: int = field(default=0, init=False)

    def join(self, rows: Iterable[Encoded]) -> Iterator[list[int]]:
        """Yields blocks of exactly `size_tokens` ids; afterwards `num_leftover_tokens` is known."""
        pending: list[int] = []
        for row in rows:
            pending += row.input_ids
            start = 0
            while len(pending) - start >= self.size_tokens:
                block = pending[start : start + self.size_tokens]
                if self.first_token_id is not None:
                    block[0] = self.first_token_id
                yield block
                start += self.size_tokens
            if start:
                del pending[:start]
        self.num_leftover_tokens = len(pending)
