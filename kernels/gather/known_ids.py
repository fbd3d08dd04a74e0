"""The ids of a served table whose ids are any 64-bit numbers. numpy only."""
from __future__ import annotations

import numpy as np


class KnownIds:
    """``ids``: int64 ``[n]``, ascending: the id of each row. Row ``n`` stands for the id ``left_out``, row ``n + 1`` for all others."""

    def __init__(self, ids: np.ndarray, left_out: int | None) -> None:
        self._ids, self._left_out = ids, left_out

    def rows(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """The row of each of ``ids`` (int64 ``[m]``), and how many of them have none of their own and are not left out."""
        count = len(self._ids)
        found = np.searchsorted(self._ids, ids)
        unknown = np.ones(len(ids), bool) if not count else self._ids[np.minimum(found, count - 1)] != ids
        found[unknown] = count + 1
        if self._left_out is not None:
            out = ids == self._left_out
            found[out] = count
            unknown &= ~out
        return found, int(unknown.sum())
