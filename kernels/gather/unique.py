"""Each row is asked for once, however many lookups of a request name it: what lies in front of every store behind a network."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .room import Room
from .tables import Table


class Unique:
    """A store over another one, which then gets each table at most once, with ids that are all different, and ascending where the table has
    several shards. The rows that it gives are valid until the same thread's next call."""

    def __init__(self, store, tables: Mapping[str, Table]) -> None:
        self.store = store
        self._names, self._tables = list(tables), list(tables.values())
        self._fetched, self._answer, self._by_name = Room(), Room(), dict(tables)
        self._number = {name: i for i, name in enumerate(tables)}
        self._cut = [len(t.shards) > 1 for t in tables.values()]
        # the rows of all tables in one numbering
        self._first = np.concatenate([[0], np.cumsum([t.rows for t in tables.values()], dtype=np.int64)])

    def lookup_many(self, requests: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
        """See :class:`.request.Store`."""
        numbers = [self._number[name] for name, _ in requests]
        keys = np.concatenate([ids + self._first[k] for k, (_, ids) in zip(numbers, requests)])
        order = keys.argsort()
        every = keys[order]
        new = every[1:] != every[:-1]
        if new.all() and len(set(numbers)) == len(numbers) and not any(self._cut[k] for k in numbers):
            return self._as_asked(requests)
        new = np.concatenate([[True], new])[: len(every)]
        place = np.empty(len(keys), np.int64)
        place[order] = np.cumsum(new) - 1
        every = every[new]
        edges = np.searchsorted(every, self._first)
        wanted = sorted({k for k in numbers if edges[k + 1] > edges[k]})
        asked = [(self._names[k], every[edges[k] : edges[k + 1]] - self._first[k]) for k in wanted]
        whole, rows = self._fetched.for_requests(asked, self._by_name)
        self.store.lookup_many(asked, rows)
        if whole is not None:
            answer, found = self._answer.for_requests(requests, self._by_name)
            if answer is not None:  # all tables have one form: one gather
                whole.take(place, 0, answer, "clip")
                return found
        by_table = dict(zip(wanted, rows))
        found, start = [], 0
        for k, (_, ids) in zip(numbers, requests):
            mine = place[start : start + len(ids)]
            start += len(ids)
            table = self._tables[k]
            found.append(by_table[k].take(mine - edges[k], 0) if len(ids) else np.empty((0, table.width), table.stored))
        return found

    def _as_asked(self, requests: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
        """No row is asked for twice, and all rows of a table are on one node: nothing to put in order, nothing to move afterwards."""
        found = self._answer.for_requests(requests, self._by_name)[1]
        asked = [k for k, (_, ids) in enumerate(requests) if len(ids)]
        self.store.lookup_many([requests[k] for k in asked], [found[k] for k in asked])
        return found

    def stats(self) -> dict[str, int]:
        """What the store counts."""
        return getattr(self.store, "stats", dict)()

    def close(self) -> None:
        self.store.close()
