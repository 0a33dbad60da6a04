"""As many rows at once as memory holds, where the results do not depend on how many that are."""

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache

from luthier.core.log import warn
from luthier.model.loading.memory_check import is_out_of_memory

Result = TypeVar("Result")


@dataclass(slots=True)
class FittingBatch:
    """Remembers how many rows memory holds, so that only the first calls find it out.

    `what`: is computed, e.g. `answers generated`.
    """

    what: str
    limit: int | None = None
    """How many rows are computed at once; None as long as no memory was refused."""

    def results(
        self, compute: Callable[[Sequence[int], int], Iterable[Result]], num_rows: int, most: int
    ) -> list[Result]:
        """One result for each row, up to `most` at once and half as many whenever memory is out.

        `compute`: (numbers of rows, how many at once) -> their results in this order, each of which depends on its own
        row only. Raises what torch raises if memory is out with a single row.
        """
        found: list[Result] = []
        while True:
            size = min(most, self.limit or most)
            try:
                for result in compute(range(len(found), num_rows), size):
                    found.append(result)  # keeps those before the error
                return found
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
            # Here, and not above: as long as the error is handled, it holds the tensors of the batch.
            gc.collect()
            clear_device_cache()
            self.limit = -(-size // 2)
            warn(f"out of memory with {size} {self.what} at once; from now on {self.limit} at once, with equal results")
