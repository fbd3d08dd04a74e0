"""Slots of rows that were prefetched for a batch, for a lookup that runs before the batch does."""
from __future__ import annotations

import torch
from torch import Tensor

from .cache import TierError
from .table import table_of


def slots_ahead(ids: Tensor, table: int, batch: int) -> Tensor:
    """Where the rows of ``ids`` are, which were prefetched for ``batch`` into the table of that number; int64, of the shape of ``ids``.

    Raises :class:`TierError` where they were not.
    """
    held, wanted = table_of(table), ids.detach().to(torch.int64)
    with held._lock:
        for each in held._ahead:
            if each[0] == batch and torch.equal(each[1], wanted):
                held._taken(each[3])
                return each[2]
    raise TierError(f"table '{held.name}': the rows of batch {batch} were not prefetched")
