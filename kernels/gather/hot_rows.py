"""Rows that are asked for often stay in this process: a cache in front of a remote store, of one version and so never stale.

Four-way set associative, in numpy: rows of equal size share an array of ``sets x 4`` slots. A row that is hit gains one use, up to a
limit; a row that misses takes one from the least used of its set, and its place when none is left, so one-off rows do not drive
frequent ones out. Exact: a row comes from the slot that has its number, else from the store.
"""
from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping

import numpy as np

from .local import Requests
from .room import Room
from .tables import Table

_WAYS, _MOST_USES = 4, 15


class _Slots:
    """The rows of all tables with one row size."""

    def __init__(self, sets: int, row_bytes: int) -> None:
        self.numbers = np.full((sets, _WAYS), -1, np.int64)
        self.uses = np.zeros((sets, _WAYS), np.int8)
        self.rows = np.empty((sets * _WAYS, row_bytes), np.uint8)

    def find(self, numbers: np.ndarray, sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether each is there, and the slots of those that are. ``numbers`` are all different; ``sets``: of each."""
        same = self.numbers.take(sets, 0) == numbers[:, None]
        at = np.flatnonzero(same)  # in the order of ``numbers``, each at most once
        which = at // _WAYS
        slots = sets.take(which) * _WAYS + at % _WAYS
        flat = self.uses.reshape(-1)
        flat[slots] = np.minimum(flat.take(slots) + 1, _MOST_USES)
        there = np.zeros(len(numbers), bool)
        there[which] = True
        return there, slots

    def sets_of(self, numbers: np.ndarray) -> np.ndarray:
        return (mixed(numbers) % np.uint64(len(self.numbers))).astype(np.int64)

    def offer(self, numbers: np.ndarray, sets: np.ndarray, rows: np.ndarray) -> None:
        """Rows that were not there (those that another thread has brought since are left out); of several for one set the first."""
        new = ~(self.numbers[sets] == numbers[:, None]).any(1)
        numbers, sets, rows = numbers[new], sets[new], rows[new]
        sets, first = np.unique(sets, return_index=True)
        ways = self.uses[sets].argmin(1)
        left = self.uses[sets, ways] - 1
        taken = left < 0
        self.uses[sets, ways] = np.maximum(left, 0)
        sets, ways, first = sets[taken], ways[taken], first[taken]
        self.numbers[sets, ways] = numbers[first]
        self.rows[sets * _WAYS + ways] = rows[first]


class HotRows:
    """A store over ``store`` that keeps about ``rows`` rows of ``tables``. Asks and is asked as ``Unique`` does. Thread-safe."""

    def __init__(self, store, tables: Mapping[str, Table], rows: int) -> None:
        self.store, self._tables = store, tables
        first = np.concatenate([[0], np.cumsum([t.rows for t in tables.values()], dtype=np.int64)])
        self._first = {name: first[i] for i, name in enumerate(tables)}
        sizes = [t.row_bytes for t in tables.values()]
        self._slots = {size: _Slots(max(1, rows * sizes.count(size) // len(sizes) // _WAYS), size) for size in set(sizes)}
        self._lock, self._room = threading.Lock(), Room()
        self._hits = self._misses = 0

    def lookup_many(self, requests: Requests, out: list[np.ndarray]) -> list[np.ndarray]:
        """The rows are written to ``out``."""
        by_size: dict[int, list[int]] = {}
        for k, (name, _) in enumerate(requests):
            by_size.setdefault(self._tables[name].row_bytes, []).append(k)
        found = [rows.view(np.uint8) for rows in out]
        missing: dict[int, np.ndarray] = {}
        kept = []
        for size, members in by_size.items():
            numbers = np.concatenate([requests[k][1] + self._first[requests[k][0]] for k in members])
            slots_of = self._slots[size]
            sets = slots_of.sets_of(numbers)
            edges = [0, *itertools.accumulate(len(requests[k][1]) for k in members)]
            with self._lock:
                there, slots = slots_of.find(numbers, sets)
                upto = np.concatenate([[0], np.cumsum(there)])[edges].tolist()
                for k, a, b, first, last in zip(members, edges, edges[1:], upto, upto[1:]):
                    if last - first == b - a:
                        slots_of.rows.take(slots[first:last], 0, found[k], "clip")
                    else:
                        found[k][there[a:b]] = slots_of.rows.take(slots[first:last], 0)
                        missing[k] = ~there[a:b]
                self._hits += len(slots)
                self._misses += len(numbers) - len(slots)
            kept.append((size, members, numbers, sets, there))
        if missing:
            order = list(missing)
            asked = [(requests[k][0], requests[k][1][missing[k]]) for k in order]
            fetched = dict(zip(order, self.store.lookup_many(asked, self._room.for_requests(asked, self._tables)[1])))
            for k, rows in fetched.items():
                found[k][missing[k]] = rows.view(np.uint8)
            for size, members, numbers, sets, there in kept:
                if not there.all():
                    rows = np.concatenate([fetched[k] for k in members if k in fetched]).view(np.uint8)
                    with self._lock:
                        self._slots[size].offer(numbers[~there], sets[~there], rows)
        return out

    def stats(self) -> dict[str, int]:
        """Hits and misses, and what the store itself counts."""
        with self._lock:
            own = {"hits": self._hits, "misses": self._misses}
        return {**getattr(self.store, "stats", dict)(), **own}

    def close(self) -> None:
        self.store.close()


def mixed(numbers: np.ndarray) -> np.ndarray:
    """Bits of ``numbers`` spread over 64 (the finalizer of SplitMix64: Steele, Lea and Flood, 2014), so that no pattern of ids, such as
    one last digit, fills a few sets or partitions only. Returns uint64."""
    z = numbers.astype(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
