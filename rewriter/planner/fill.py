"""Fill ranks with tables: options as arrays, placements, and the greedy ways to make one."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .option import Option, most

BISECTIONS = 10
CLOSE = 1.002  # this near to a bound is near enough


class Problem:
    """Options as arrays, for choosing among them quickly."""

    def __init__(self, options: Sequence[Sequence[Option]], ranks: int, room: float) -> None:
        self.options, self.ranks, self.room = options, ranks, room
        widest = max((len(of) for of in options), default=0)
        self.mean = np.full((len(options), widest), np.inf)
        self.largest, self.bytes, self.everywhere, self.wide, self.shard_bytes = (self.mean.copy() for _ in range(5))
        for t, of in enumerate(options):
            for i, o in enumerate(of):
                if o.largest_memory <= room:
                    self.mean[t, i], self.largest[t, i], self.bytes[t, i] = o.mean(ranks), o.largest, o.mean_memory(ranks)
                    self.everywhere[t, i], self.wide[t, i], self.shard_bytes[t, i] = o.everywhere, o.width, most(o.memory)
        self.bound = 0.0
        if options:
            shared = np.where(np.isfinite(self.mean), self.everywhere, np.inf).min(1)  # every rank pays the other tables' too
            self.bound = float(max(self.mean.min(1).sum(), (self.largest.min(1) - shared).max() + shared.sum()))
        self.shards: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, bool]] = {}

    def price(self, fill: float) -> float:
        """The least price on memory (seconds for a byte) at which the cheapest options together take ``fill`` of it."""
        if not self.options:
            return 0.0
        rows = np.arange(len(self.options))

        def fits(price: float) -> bool:
            chosen = (self.mean + (price * self.bytes if price else 0.0)).argmin(1)
            return float(self.bytes[rows, chosen].sum()) <= fill * self.room

        if fits(0.0):
            return 0.0
        unit = self.bound / self.room
        low, high = -6.0, 6.0  # powers of ten
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(unit * 10**middle) else (middle, high)
        return unit * 10**high

    def least_target(self, price: float, fit: str, charge: float, known: float | None) -> Placement | None:
        """The placement with the least slowest rank that :meth:`under` finds, by bisection from the bound on; ``None`` if it finds none, or
        none that is better than ``known``."""
        low, high, best = self.bound, known * 0.999 if known is not None else self.bound, None
        for _ in range(12 if known is None else 1):  # doubling: from the bound to 4,096 times
            best = self.under(high, price, fit, charge)
            if best is not None:
                break
            low, high = high, 2 * high
        if best is None:
            return None
        for _ in range(BISECTIONS):
            if best.slowest <= low * CLOSE:
                break
            middle = (low + best.slowest) / 2
            found = self.under(middle, price, fit, charge)
            if found is None:
                low = middle
            else:
                best = found if found.slowest < best.slowest else best
        return best

    def under(self, target: float, price: float, fit: str, charge: float) -> Placement | None:
        """One table after the other, the largest shards first, in the cheapest way in which no rank takes longer than ``target``; ``None``
        where there is none. What the tables cost on every rank is left free from the start.

        ``fit``: "least" puts a shard on the least loaded rank, "best" on the most loaded that can take it; "memory" takes the tables in the
        order of the scarcer of time and memory. ``charge``, from 0 to 1: how much of what its shards may make unusable a way pays for: of a
        rank in which two of them fit, half each. The more small shards there are to fill gaps, the less that is."""
        if not self.options:
            return Placement(self, [])
        with np.errstate(invalid="ignore", divide="ignore"):
            everywhere = np.where(np.isfinite(self.mean), self.everywhere, np.inf)
            free = target - everywhere.min(1).sum()
            shard = self.largest - self.everywhere
            waste = np.where(shard > 0, free / np.floor(np.maximum(free / shard, 1e-9)) / shard, 1.0)
            value = self.everywhere + (self.mean - self.everywhere) * (1.0 + charge * (waste - 1.0)) + (price * self.bytes if price else 0.0)
        value = np.where((shard <= free) & np.isfinite(self.mean), value, np.inf)
        cheapest = np.argsort(value, axis=1, kind="stable")
        rows = np.arange(len(self.options))
        first = cheapest[:, 0]
        if not np.isfinite(value[rows, first]).all():
            return None
        least = everywhere[rows, first]
        weight = shard[rows, first] / max(target, 1e-30)
        if fit == "memory":
            weight = np.maximum(weight, self.shard_bytes[rows, first] / self.room)
        order = np.lexsort((rows, -weight, -self.wide[rows, first]))
        state = Placement(self, [0] * len(self.options))
        reserved = float(least.sum())
        for table in map(int, order):
            reserved -= least[table]
            for index in map(int, cheapest[table]):
                if not np.isfinite(value[table, index]):
                    return None
                places = state.find(table, index, target - reserved if fit == "best" else None)
                if places is None:
                    continue
                seconds, _ = state.vectors(table, index, places)
                if float((state.load + seconds).max()) + reserved <= target:
                    state.put(table, index, places)
                    break
            else:
                return None
        return state

    def of(self, table: int, index: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """An option's costs and memory as ``[groups, width]``, and whether all its groups are alike."""
        key = (table, index)
        if key not in self.shards:
            option = self.options[table][index]
            costs, memory = (np.reshape(of, (-1, option.width)) for of in (option.costs, option.memory))
            self.shards[key] = costs, memory, bool((costs == costs[:1]).all() and (memory == memory[:1]).all())
        return self.shards[key]


class Placement:
    """A placement, whole or in the making. ``costs[t]``: seconds of table ``t`` on each rank."""

    def __init__(self, problem: Problem, chosen: list[int]) -> None:
        self.problem, self.chosen = problem, chosen
        self.places: list[tuple[int, ...]] = [()] * len(chosen)
        self.costs = np.zeros((len(chosen), problem.ranks))
        self.load, self.memory = np.zeros(problem.ranks), np.zeros(problem.ranks)

    @property
    def slowest(self) -> float:
        return float(self.load.max())

    def find(self, table: int, index: int, target: float | None = None) -> tuple[int, ...] | None:
        """A place for every group of an option, each where the slowest of its ranks is least loaded afterwards, or with a ``target`` most
        loaded but not above it; ``None`` if one fits nowhere."""
        option = self.problem.options[table][index]
        costs, memory, alike = self.problem.of(table, index)
        slots = self.problem.ranks // option.width
        room = self.problem.room - self.memory - option.everywhere_memory
        if room.min() < 0:
            return None
        if not len(costs):
            return ()
        room, load = room.reshape(slots, -1), self.load.reshape(slots, -1)
        limit = np.inf if target is None else target - option.everywhere

        def after_adding(group: int) -> np.ndarray:
            after = (load + costs[group]).max(1)
            if target is not None:
                after = np.where(after <= limit, -after, np.inf)
            after[(room < memory[group]).any(1)] = np.inf
            return after

        if alike:
            after = after_adding(0)
            best = np.argsort(after, kind="stable")[: len(costs)]
            return tuple((best * option.width).tolist()) if after[best[-1]] < np.inf and len(best) == len(costs) else None
        taken = np.zeros(slots, dtype=bool)
        found = [0] * len(costs)
        for group in np.argsort(-costs.max(1), kind="stable"):
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
