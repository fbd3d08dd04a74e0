"""Memory for rows that each thread keeps and uses again: fresh pages for every request cost more than copying the rows into them."""
from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np

from .local import Requests
from .tables import Table


class Room:
    """What it hands out is valid until the same thread's next call."""

    def __init__(self) -> None:
        self._own = threading.local()

    def rows(self, count: int, table: Table) -> np.ndarray:
        """``[count, table.width]`` of ``table.stored``, not initialised."""
        needed = count * table.row_bytes
        kept = getattr(self._own, "kept", None)
        if kept is None or len(kept) < needed:
            kept = self._own.kept = np.empty(max(needed, 1 << 16), np.uint8)
        return kept[:needed].view(table.stored).reshape(count, table.width)

    def for_requests(self, requests: Requests, tables: Mapping[str, Table]) -> tuple[np.ndarray | None, list[np.ndarray]]:
        """An array for each request's rows. Where all tables have one form they are the parts of one array, in order, which is given too."""
        if len({(tables[name].row_dtype, tables[name].dim) for name, _ in requests}) != 1:
            return None, [np.empty((len(ids), tables[name].width), tables[name].stored) for name, ids in requests]
        whole, start, parts = self.rows(sum(len(ids) for _, ids in requests), tables[requests[0][0]]), 0, []
        for _, ids in requests:
            parts.append(whole[start : start + len(ids)])
            start += len(ids)
        return whole, parts
