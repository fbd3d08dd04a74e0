"""A lower bound on the slowest rank of any placement, by linear programming (scipy's HiGHS).

For a time T, a linear program says whether a placement may take no longer. Its variables are how much of a table is placed in each
way (fractions, for equal tables their sum). It is a relaxation: whatever a true placement does satisfies it, namely

* every table is placed:              ``sum_o x[t,o] = 1``
* the mean rank is no slower:         ``sum x[t,o] mean_seconds[t,o] <= T``
* the mean rank holds no more:        ``sum x[t,o] mean_bytes[t,o] <= memory``
* each table's largest shard lies on some rank, which also pays what all tables cost on every rank, ``E = sum x[t,o] everywhere[t,o]``:
  ``E + sum_o x[t,o] largest_shard[t,o] <= T``; ways whose largest shard is too long for T outright are left out
  (Lenstra, Shmoys and Tardos, 1990)
* whole shards must be packed: with ``E0`` the least E that the program allows, all shards on one rank take at most ``C = T - E0``, so for any
  dual feasible function u (sizes that fit in 1 have u's that sum to at most 1) ``sum x[t,o] sum_shards u(seconds / C) <= ranks``; the
  classical families of Fekete and Schepers (2001) are used

The bound is the least T for which the program has a solution, by bisection to 0.01 %; larger T only loosens it.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

_ROUNDS = 3  # of raising E0
_SAFE = 1 - 1e-9


def _rounded(k: int) -> Callable[[np.ndarray], np.ndarray]:
    def u(x: np.ndarray) -> np.ndarray:
        steps = (k + 1) * x
        return np.where(np.isclose(steps, np.round(steps), rtol=0, atol=1e-9), x, np.floor(steps) / k)

    return u


def _trimmed(least: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.where(x > 1 - least, 1.0, np.where(x < least, 0.0, x))


_DUAL_FEASIBLE = [*(_rounded(k) for k in range(1, 7)), *(_trimmed(e) for e in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5))]


class _Program:
    """The options as arrays; equal tables (one list of options) as one group."""

    def __init__(self, options: Sequence[Sequence], ranks: int, room: float) -> None:
        groups: dict[int, list] = {}
        for of in options:
            groups.setdefault(id(of), [of, 0])[1] += 1
        flat = [(g, o) for g, (of, _) in enumerate(groups.values()) for o in of]
        self.ranks, self.room = ranks, room
        self.count = np.array([n for _, n in groups.values()], dtype=float)
        self.group = np.array([g for g, _ in flat])
        self.mean = np.array([o.mean(ranks) for _, o in flat])
        self.held = np.array([o.mean_memory(ranks) for _, o in flat])
        self.everywhere = np.array([o.everywhere for _, o in flat])
        self.largest = np.array([max(o.costs, default=0.0) for _, o in flat])
        self.fits = np.array([o.largest_memory for _, o in flat]) <= room
        shards = [np.asarray(o.costs, dtype=float) for _, o in flat]
        self.owner = np.repeat(np.arange(len(flat)), [len(s) for s in shards])
        self.shards = np.concatenate(shards)

    def allows(self, time: float) -> bool:
        """May a placement take no longer than ``time``?"""
        keep = self.fits & (self.largest + self.everywhere <= time)
        packing: list[np.ndarray] = []
        for _ in range(_ROUNDS + 1):
            least = self.solve(time, keep, packing)
            if least is None:
                return False
            free = time - least
            if free <= 0:
                return not (self.largest[keep] > 0).any()
            keep = keep & (self.largest <= free * (1 + 1e-9))
            x = self.shards / free * _SAFE
            packing = [np.bincount(self.owner, weights=u(np.minimum(x, 1.0)), minlength=len(keep)) for u in _DUAL_FEASIBLE]
        return True

    def solve(self, time: float, keep: np.ndarray, packing: list[np.ndarray]) -> float | None:
        """The least that tables cost on every rank; ``None`` where nothing satisfies the program."""
        at = np.flatnonzero(keep)
        n, groups = len(at), len(self.count)
        if len(np.unique(self.group[at])) < groups:
            return None
        once = csr_matrix((np.ones(n), (self.group[at], np.arange(n))), shape=(groups, n))
        scale = max(self.room, 1.0)
        own = csr_matrix((self.largest[at] / self.count[self.group[at]], (self.group[at], np.arange(n))), shape=(groups, n))
        everywhere = np.ones((groups, 1)) @ self.everywhere[at][None]
        rows = [self.mean[at] / time, self.held[at] / scale, *(p[at] / self.ranks for p in packing)]
        limits = [1.0, self.room / scale, *([1.0] * len(packing))]
        a = np.vstack([*rows, (own.toarray() + everywhere) / time])
        b = np.array([*limits, *([1.0] * groups)]) * (1 + 1e-9)
        found = linprog(self.everywhere[at] / time, A_ub=a, b_ub=b, A_eq=once, b_eq=self.count, bounds=(0, None), method="highs")
        return float(found.fun) * time * _SAFE if found.status == 0 else None


def lower_bound(options: Sequence[Sequence], ranks: int, memory: float, base_load: float = 0.0, base_memory: float = 0.0) -> float:
    """Seconds that the slowest rank takes at least; ``inf`` where nothing fits. ``options`` as in ``rewriter/planner/search.py``."""
    if not options:
        return base_load
    program = _Program(options, ranks, memory - base_memory)
    low, high = 0.0, float((program.mean.max() + program.largest.max()) * program.count.sum() * ranks) or 1e-30
    if not program.allows(high):
        return np.inf
    start = program.mean.max()
    while start > 0 and start < high and not program.allows(start):
        low, start = start, 2 * start
    high = min(high, start) if start > 0 else high
    while high > low * 1.0001 and high > 1e-15:
        middle = (low + high) / 2
        low, high = (low, middle) if program.allows(middle) else (middle, high)
    return low + base_load
