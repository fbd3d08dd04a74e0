"""Make a placement better, a step at a time: move or swap shards of the slowest rank, cut its tables otherwise, or take several tables off
and put them back below a lower limit. Choices that could fall either way come from a generator with a fixed seed."""
from __future__ import annotations

import numpy as np

from .fill import CLOSE, Placement

_TRIED = 12  # tables of the slowest rank that are tried before a step is given up
_LEAST_GAIN = 1 - 1e-9


def refine(state: Placement, bound: float, repacked: int = 0) -> None:
    """Until the slowest rank is near ``bound``, or nothing helps. ``repacked``: how many tables may be taken off and put back in tries."""
    random = np.random.default_rng(0)
    left = repacked
    for _ in range(20 * len(state.chosen) + 100):
        if state.slowest <= bound * CLOSE:
            return
        slowest = int(state.load.argmax())
        tables = np.argsort(-state.costs[:, slowest], kind="stable")[:_TRIED]
        if _move(state, tables) or _swap(state, slowest, tables):
            continue
        while left > 0:
            taken = int(random.integers(2, 7))
            left -= taken
            if _repack(state, slowest, taken, random):
                break
        else:
            return


def _repack(state: Placement, slowest: int, count: int, random: np.random.Generator) -> bool:
    """Take ``count`` tables off, one of them of the slowest rank, and put each back in the cheapest way under a lower limit, the largest
    first; or leave all as it was."""
    problem, before = state.problem, state.slowest
    target = before * (1 - random.uniform(0.001, 0.02))
    here = np.flatnonzero(state.costs[:, slowest] > 0)
    weights = state.costs[here, slowest]
    tables = {int(random.choice(here, p=weights / weights.sum()))}
    tables.update(map(int, random.integers(0, len(state.chosen), count - 1)))
    kept = [(t, state.chosen[t], state.places[t]) for t in sorted(tables)]
    for table, _, _ in kept:
        state.take(table)
    fit = target if random.random() < 0.5 else None
    put: list[int] = []
    for table, _, _ in sorted(kept, key=lambda k: -float(problem.mean[k[0], k[1]])):
        for index in map(int, np.argsort(problem.mean[table], kind="stable")):
            if problem.largest[table, index] > target:
                continue
            places = state.find(table, index, fit)
            if places is None:
                continue
            seconds = state.vectors(table, index, places)[0]
            after = state.load + seconds
            if after.max() <= before and after[seconds > seconds.min()].max(initial=0.0) <= target:
                state.put(table, index, places)
                put.append(table)
                break
        else:
            break
    if len(put) == len(kept) and state.load[slowest] <= target:
        return True
    for table in put:
        state.take(table)
    for table, index, places in kept:
        state.put(table, index, places)
    return False


def _move(state: Placement, tables: np.ndarray) -> bool:
    """Put one of ``tables`` elsewhere, or in another way, if the slowest rank gains by it."""
    before = state.slowest
    for table in map(int, tables):
        index, places = state.chosen[table], state.places[table]
        state.take(table)
        best = before * _LEAST_GAIN, index, places
        for other in range(len(state.problem.options[table])):
            found = state.find(table, other)
            if found is not None:
                value = float((state.load + state.vectors(table, other, found)[0]).max())
                if value < best[0]:
                    best = value, other, found
        state.put(table, *best[1:])
        if state.slowest < before * _LEAST_GAIN:
            return True
    return False


def _swap(state: Placement, slowest: int, tables: np.ndarray) -> bool:
    """Exchange a shard of the slowest rank for a smaller one of a rank with less to do."""
    before, room = state.slowest, state.problem.room
    mine = [(t, g, *state.shard(t, g)) for t in map(int, tables) if (g := state.group_on(t, slowest)) is not None]
    for other in map(int, np.argsort(state.load, kind="stable")[:8]):
        gap = state.load[slowest] - state.load[other]
        theirs = [(t, g, *state.shard(t, g)) for t in map(int, np.flatnonzero(state.costs[:, other])) if (g := state.group_on(t, other)) is not None]
        best = 1e-9 * before, None
        for t, g, cost, held in mine:
            for u, h, cost2, held2 in theirs:
                gain = min(cost - cost2, gap - (cost - cost2))  # of the slower of the two ranks
                if gain <= best[0] or t == u or other in state.places[t] or slowest in state.places[u]:
                    continue
                if state.memory[slowest] - held + held2 <= room and state.memory[other] - held2 + held <= room:
                    best = gain, (t, g, u, h)
        if best[1] is not None:
            t, g, u, h = best[1]
            for table, group, to in ((t, g, other), (u, h, slowest)):
                state.take(table)
                state.put(table, state.chosen[table], tuple(to if i == group else p for i, p in enumerate(state.places[table])))
            return True
    return False
