"""Choose one way of sharding for each table, and a rank for each shard, so that the slowest rank is as fast as possible.

The problem is scheduling on parallel machines with a choice of how each job is cut, under a memory limit for each machine; it is
NP-hard, so this is a heuristic (``benchmarks/planner.py`` measures it against a linear-programming bound). For a time that no rank shall
exceed, tables are placed one after the other, each in the cheapest way that keeps to it (``fill.py``); bisection finds the least such
time; where memory is short, ways that save it get cheaper by a price on bytes. The best placements are then refined (``refine.py``).
Ties and tries are the same in every run, so ranks that plan alone plan alike.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import PlanError
from .fill import Placement, Problem
from .option import Option, size
from .refine import refine

_FILLS = (1.0, 0.99, 0.97, 0.94, 0.9, 0.8, 0.6, 0.3, 0.0)  # of the memory, how much the options may take together
_REFINED = 4  # of the placements found, the best so many are refined
_REPACKED = 4000  # tables that are taken off and put back in tries, of the best placement
_MANNERS = (  # of placing: see Problem.under
    ("least", 0.0), ("least", 0.5), ("least", 1.0), ("best", 0.0), ("best", 0.1), ("best", 0.25), ("best", 0.5), ("best", 0.75), ("best", 1.0),
    ("memory", 0.0),
)  # fmt: skip


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
    problem = Problem(options, ranks, room)
    found: list[Placement] = []
    for fill in _FILLS:
        price = problem.price(fill)
        before = len(found)
        for fit, charge in _MANNERS:
            state = problem.least_target(price, fit, charge, min((s.slowest for s in found), default=None))
            found += [state] if state is not None else []
        if len(found) > before and price == 0:
            break
    if not found:
        need = max(max(min(o.largest_memory for o in of) for of in options), sum(min(o.mean_memory(ranks) for o in of) for of in options))
        raise PlanError(
            f"no placement of the {len(options)} tables on {ranks} ranks was found: at least {size(need)} of {size(room)} of each rank would be "
            "used, and they did not pack. What to do: more memory or ranks, or shardings that cut tables finer (row_wise)"
        )
    found = sorted(found, key=lambda s: s.slowest)[:_REFINED]
    for state in found:
        refine(state, problem.bound)
    best = min(found, key=lambda s: s.slowest)
    refine(best, problem.bound, _REPACKED)
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
