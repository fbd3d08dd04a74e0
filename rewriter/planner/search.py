"""Choose one way of sharding for each table, and a rank for each shard, so that the slowest rank is as fast as possible.

The problem is scheduling on parallel machines with a choice of how each job is cut, under a memory limit for each machine; it is
NP-hard, so this is a heuristic (``benchmarks/planner.py`` measures it against a linear-programming bound). A cap on the largest shard and a price
on memory choose the options: the cheapest in total among those that are cut finely enough. The shards are placed
largest first on the rank that is then least loaded. The best placements over several caps and prices are refined: tables on the slowest
rank are moved, cut otherwise or swapped while that helps. Nothing is random: equal input gives an equal plan on every rank.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import PlanError

_CAPS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.04, 0.02)
_FILLS = (1.0, 0.99, 0.97, 0.94, 0.9, 0.8, 0.6, 0.3, 0.0)  # of the memory, how much the options may take together
_REFINED = 4  # of the placements found, the best so many are refined
_TRIED = 12  # tables of the slowest rank that are tried before it is given up
_CLOSE = 1.002  # this near to a bound, refining stops


@dataclass(frozen=True)
class Option:
    """One way to place one table. ``costs`` and ``memory`` (seconds, bytes): one entry for each shard. Shards come in groups of ``width``
    that lie on ``width`` consecutive ranks: 1 for any rank, the size of a node for the ranks of a node, all ranks for a fixed place. The
    groups of an option lie in different places. ``everywhere``: seconds on each rank besides; ``everywhere_memory``: bytes.
    ``label`` is the caller's."""

    costs: tuple[float, ...]
    memory: tuple[float, ...]
    width: int = 1
    everywhere: float = 0.0
    everywhere_memory: float = 0.0
    label: Any = None

    def mean(self, ranks: int) -> float:
        """Seconds a rank, if they were spread evenly."""
        return self.everywhere + sum(self.costs) / ranks

    def mean_memory(self, ranks: int) -> float:
        """Bytes a rank, if they were spread evenly."""
        return self.everywhere_memory + sum(self.memory) / ranks

    @property
    def largest(self) -> float:
        """The least that the slowest rank takes with this option."""
        return self.everywhere + max(self.costs, default=0.0)

    @property
    def largest_memory(self) -> float:
        """The least that the fullest rank holds with this option."""
        return self.everywhere_memory + max(self.memory, default=0.0)


@dataclass
class Assignment:
    """``chosen[t]``: the index of table ``t``'s option; ``places[t]``: for each of its groups the first rank. ``load`` and ``memory``:
    seconds and bytes of each rank, with what each has besides the tables."""

    chosen: list[int]
    places: list[tuple[int, ...]]
    load: np.ndarray
    memory: np.ndarray

    @property
    def slowest(self) -> float:
        """Seconds of the slowest rank."""
        return float(self.load.max())


def search(
    options: Sequence[Sequence[Option]], ranks: int, memory: float, *, names: Sequence[str] | None = None, base_load: float = 0.0,
    base_memory: float = 0.0,
) -> Assignment:  # fmt: skip
    """The best assignment found. ``memory``: bytes of each rank; ``base_load`` and ``base_memory``: seconds and bytes that each rank has
    besides the tables. Raises :class:`PlanError` naming the table where one cannot fit, or the largest where all together do not."""
    names = names or [f"table {i}" for i in range(len(options))]
    room = memory - base_memory
    refuse_what_cannot_fit(options, ranks, room, names)
    problem = _Problem(options, ranks, room)
    tried: dict[tuple[int, ...], _State | None] = {}
    for fill in _FILLS:
        tight = False
        for cap in _CAPS:
            chosen = problem.choose(fill, cap)
            if chosen not in tried:
                tried[chosen], by_time = problem.pack(chosen)
                tight |= not by_time
        if not tight and any(tried.values()):
            break  # they packed by time alone: to leave more memory free would only cost time
    found = sorted((s for s in tried.values() if s is not None), key=lambda s: s.slowest)
    if not found:
        need = max(max(min(o.largest_memory for o in of) for of in options), sum(min(o.mean_memory(ranks) for o in of) for of in options))
        raise PlanError(
            f"no placement of the {len(options)} tables on {ranks} ranks was found: at least {size(need)} of {size(room)} of each rank would be "
            "used, and they did not pack. What to do: more memory or ranks, or shardings that cut tables finer (row_wise)"
        )
    best: _State | None = None
    for state in found[:_REFINED]:
        _refine(state, problem.bound)
        best = state if best is None or state.slowest < best.slowest else best
        if best.slowest <= problem.bound * _CLOSE:
            break
    assert best is not None
    return Assignment(best.chosen, best.places, best.load + base_load, best.memory + base_memory)


def refuse_what_cannot_fit(options: Sequence[Sequence[Option]], ranks: int, room: float, names: Sequence[str]) -> None:
    """Raises :class:`PlanError` where the memory of the ranks is too small whatever the placement."""
    if room < 0:
        raise PlanError(f"the model without its tables needs {size(-room)} more than a rank has. What to do: devices with more memory, or a smaller batch")
    for name, of in zip(names, options):
        least = min(of, key=lambda o: o.largest_memory)
        if least.largest_memory > room:
            raise PlanError(
                f"table '{name}' does not fit: {size(least.largest_memory)} would lie on one rank ({least.label}), and {size(room)} is there for "
                "tables. What to do: more ranks or memory, a sharding that cuts it finer (row_wise), or an optimizer with less state"
            )
    total = sum(min(o.mean_memory(ranks) for o in of) for of in options)
    if total > room:
        needs = [(min(o.mean_memory(ranks) for o in of), name) for of, name in zip(options, names)]
        worst = ", ".join(f"'{name}' {size(need * ranks)}" for need, name in sorted(needs, key=lambda n: -n[0])[:3])
        raise PlanError(
            f"the tables do not fit: {size(total * ranks)} in all, and {ranks} ranks have {size(room * ranks)} for them. The largest: {worst}. "
            "What to do: more ranks or memory, or an optimizer with less state"
        )


def size(count: float) -> str:
    """Bytes for people."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.4g} {unit}"
    return f"{count:.0f} B"


class _Problem:
    """Options as arrays, for choosing among them quickly."""

    def __init__(self, options: Sequence[Sequence[Option]], ranks: int, room: float) -> None:
        self.options, self.ranks, self.room = options, ranks, room
        widest = max((len(of) for of in options), default=0)
        self.mean = np.full((len(options), widest), np.inf)
        self.largest, self.bytes = self.mean.copy(), self.mean.copy()
        for t, of in enumerate(options):
            for i, o in enumerate(of):
                if o.largest_memory <= room:
                    self.mean[t, i], self.largest[t, i], self.bytes[t, i] = o.mean(ranks), o.largest, o.mean_memory(ranks)
        self.bound = float(max(self.mean.min(1).sum(), self.largest.min(1).max())) if options else 0.0
        self.shards: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, bool]] = {}

    def choose(self, fill: float, cap: float) -> tuple[int, ...]:
        """For each table the cheapest option among those whose largest shard takes at most ``cap`` of the bound (the finest where none
        does), with the least price on memory at which all together take ``fill`` of it, or the highest where none is enough."""
        if not self.options:
            return ()
        limit = np.maximum(cap * self.bound, self.largest.min(1))
        allowed = self.largest <= limit[:, None]
        rows = np.arange(len(self.options))

        def at(price: float) -> np.ndarray:
            value = self.mean + (price * self.bound / self.room * self.bytes if price else 0.0)
            return np.where(allowed, value, np.inf).argmin(1)

        def fits(chosen: np.ndarray) -> bool:
            return float(self.bytes[rows, chosen].sum()) <= fill * self.room

        chosen = at(0.0)
        if not fits(chosen):
            low, high = -6.0, 6.0  # powers of ten
            chosen = at(10**high)
            for _ in range(24 if fits(chosen) else 0):
                middle = (low + high) / 2
                found = at(10**middle)
                if fits(found):
                    high, chosen = middle, found
                else:
                    low = middle
        return tuple(map(int, chosen))

    def pack(self, chosen: tuple[int, ...]) -> tuple[_State | None, bool]:
        """Wide options first, then the largest shard first: by time (and True); where that runs out of memory, by time and memory, whichever
        is scarcer; then by memory."""
        unit = self.bound or 1.0, self.room or 1.0
        for weight in (1.0, 0.0), (1.0, 1.0), (0.0, 1.0):
            state = _State(self, list(chosen))
            state.weights = weight[0] / unit[0], weight[1] / unit[1]

            def order(t: int, state: _State = state) -> tuple:
                option = self.options[t][chosen[t]]
                largest = max(max(option.costs, default=0.0) * state.weights[0], max(option.memory, default=0.0) * state.weights[1])
                return (-option.width if option.costs else -self.ranks - 1), -largest, t

            if all(state.place(t, chosen[t]) for t in sorted(range(len(chosen)), key=order)):
                state.weights = 1.0, 0.0
                return state, not weight[1]
        return None, False

    def of(self, table: int, index: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """An option's costs and memory as ``[groups, width]``, and whether all its groups are alike."""
        key = (table, index)
        if key not in self.shards:
            option = self.options[table][index]
            costs, memory = (np.reshape(of, (-1, option.width)) for of in (option.costs, option.memory))
            self.shards[key] = costs, memory, bool((costs == costs[:1]).all() and (memory == memory[:1]).all())
        return self.shards[key]


class _State:
    """A placement, whole or in the making. ``costs[t]``: seconds of table ``t`` on each rank. ``weights``: of seconds and bytes, where a
    shard is placed on the rank that has least."""

    weights = 1.0, 0.0

    def __init__(self, problem: _Problem, chosen: list[int]) -> None:
        self.problem, self.chosen = problem, chosen
        self.places: list[tuple[int, ...]] = [()] * len(chosen)
        self.costs = np.zeros((len(chosen), problem.ranks))
        self.load, self.memory = np.zeros(problem.ranks), np.zeros(problem.ranks)

    @property
    def slowest(self) -> float:
        return float(self.load.max())

    def find(self, table: int, index: int) -> tuple[int, ...] | None:
        """A place for every group of an option, each where the slowest of its ranks is least loaded afterwards; ``None`` if one fits
        nowhere."""
        option = self.problem.options[table][index]
        costs, memory, alike = self.problem.of(table, index)
        slots = self.problem.ranks // option.width
        room = self.problem.room - self.memory - option.everywhere_memory
        if room.min() < 0:
            return None
        if not len(costs):
            return ()
        room, load = room.reshape(slots, -1), self.load.reshape(slots, -1)
        by_time, by_memory = self.weights

        def after_adding(group: int) -> np.ndarray:
            after = ((load + costs[group]) * by_time).max(1)
            if by_memory:
                after = np.maximum(after, ((self.problem.room - room + memory[group]) * by_memory).max(1))
            after[(room < memory[group]).any(1)] = np.inf
            return after

        if alike:
            after = after_adding(0)
            best = np.argsort(after, kind="stable")[: len(costs)]
            return tuple((best * option.width).tolist()) if after[best[-1]] < np.inf and len(best) == len(costs) else None
        taken = np.zeros(slots, dtype=bool)
        found = [0] * len(costs)
        for group in np.argsort(-np.maximum(costs.max(1) * by_time, memory.max(1) * by_memory), kind="stable"):
            after = after_adding(group)
            after[taken] = np.inf
            slot = int(after.argmin())
            if after[slot] == np.inf:
                return None
            taken[slot] = True
            found[group] = slot * option.width
        return tuple(found)

    def vectors(self, table: int, index: int, places: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and bytes of a table on each rank."""
        option = self.problem.options[table][index]
        seconds, held = np.full(self.problem.ranks, option.everywhere), np.full(self.problem.ranks, option.everywhere_memory)
        if places:
            costs, memory, _ = self.problem.of(table, index)
            on = np.add.outer(places, np.arange(option.width))
            seconds[on] += costs
            held[on] += memory
        return seconds, held

    def put(self, table: int, index: int, places: tuple[int, ...]) -> None:
        seconds, held = self.vectors(table, index, places)
        self.chosen[table], self.places[table], self.costs[table] = index, places, seconds
        self.load += seconds
        self.memory += held

    def take(self, table: int) -> None:
        seconds, held = self.vectors(table, self.chosen[table], self.places[table])
        self.load -= seconds
        self.memory -= held

    def group_on(self, table: int, rank: int) -> int | None:
        """Which of a table's one-rank shards is on ``rank``."""
        if self.problem.options[table][self.chosen[table]].width != 1 or rank not in self.places[table]:
            return None
        return self.places[table].index(rank)

    def shard(self, table: int, group: int) -> tuple[float, float]:
        """Seconds and bytes of a one-rank shard."""
        option = self.problem.options[table][self.chosen[table]]
        return option.costs[group], option.memory[group]

    def place(self, table: int, index: int) -> bool:
        """Find and put; False if it fits nowhere."""
        places = self.find(table, index)
        if places is None:
            return False
        self.put(table, index, places)
        return True


# --- refining ----------------------------------------------------------------------------------------------------------------


def _refine(state: _State, bound: float) -> None:
    for _ in range(20 * len(state.chosen) + 100):
        if state.slowest <= bound * _CLOSE:
            return
        slowest = int(state.load.argmax())
        tables = np.argsort(-state.costs[:, slowest], kind="stable")[:_TRIED]
        if not (_move(state, tables) or _swap(state, slowest, tables)):
            return


def _move(state: _State, tables: np.ndarray) -> bool:
    """Put one of ``tables`` elsewhere, or in another way, if the slowest rank gains by it."""
    before = state.slowest
    for table in map(int, tables):
        index, places = state.chosen[table], state.places[table]
        state.take(table)
        best = before * (1 - 1e-9), index, places
        for other in range(len(state.problem.options[table])):
            found = state.find(table, other)
            if found is not None:
                value = float((state.load + state.vectors(table, other, found)[0]).max())
                if value < best[0]:
                    best = value, other, found
        state.put(table, *best[1:])
        if state.slowest < before * (1 - 1e-9):
            return True
    return False


def _swap(state: _State, slowest: int, tables: np.ndarray) -> bool:
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
