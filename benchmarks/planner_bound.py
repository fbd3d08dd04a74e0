"""A lower bound on the slowest rank of any placement, by linear programming (scipy's HiGHS).

Relaxation: a table may be split over its options in any fractions, and the shards of an option may be spread over ranks in any
fractions. Ranks are alike, so the relaxed optimum spreads all work evenly and the mean load bounds the slowest rank from below:

    minimise T   subject to   sum_o x[t,o] = 1,   sum x[t,o] * mean_seconds[t,o] <= T,   sum x[t,o] * mean_bytes[t,o] <= memory

An option whose largest single shard takes longer than T cannot be part of a placement that takes T (Lenstra, Shmoys and Tardos, 1990),
so the bound is the least T at which the program without those options has an optimum of at most T: by bisection. Options of which
a shard is larger than a rank's memory are left out from the start. What the bound does not know: that whole shards must be packed.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix, vstack


def lower_bound(options: Sequence[Sequence], ranks: int, memory: float, base_load: float = 0.0, base_memory: float = 0.0) -> float:
    """Seconds that the slowest rank takes at least; ``inf`` where nothing fits. ``options`` as in ``rewriter/planner/search.py``."""
    flat = [(t, o.mean(ranks), o.mean_memory(ranks), o.largest, o.largest_memory) for t, of in enumerate(options) for o in of]
    if not flat:
        return base_load
    table, mean, held, largest, largest_held = (np.array(column) for column in zip(*flat))
    room = memory - base_memory

    def optimum(limit: float) -> float:
        """The relaxed optimum with shards of at most ``limit`` seconds."""
        keep = (largest <= limit) & (largest_held <= room)
        rows, kept = table[keep], int(keep.sum())
        if len(set(rows.tolist())) < len(options):
            return np.inf
        once = coo_matrix((np.ones(kept), (rows, np.arange(kept))), shape=(len(options), kept))
        scale = max(held.max(), 1.0)
        found = linprog(
            mean[keep], A_eq=once, b_eq=np.ones(len(options)), A_ub=vstack([coo_matrix(held[keep][None] / scale)]), b_ub=[room / scale],
            bounds=(0, 1), method="highs",
        )  # fmt: skip
        return float(found.fun) if found.status == 0 else np.inf

    floor = optimum(np.inf)
    if not np.isfinite(floor):
        return np.inf
    steps = np.unique(largest[largest > 0])  # the program changes only where an option comes in
    low, high = 0, len(steps) - 1
    while low < high:  # the first step at which the optimum is at most the largest shard allowed
        middle = (low + high) // 2
        if optimum(steps[middle]) <= steps[middle]:
            high = middle
        else:
            low = middle + 1
    if not len(steps):
        return floor + base_load
    # Between two steps the set of options is the lower step's: there the least T is its own optimum.
    below = optimum(steps[low - 1]) if low else np.inf
    return max(floor, min(steps[low], below)) + base_load
