"""What published table sets are predicted to do on 1, 8 and 128 ranks of a kind of machine."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import PlanError, nearest
from .auto import place
from .forecast import Forecast, columns
from .option import size
from .table_sets import SETS, TableSet
from .topology import Topology


@dataclass(frozen=True, eq=False)
class Simulated:
    """One set on some ranks. ``forecast`` is ``None`` where it does not fit, and ``why`` says so. ``scaling``: samples a second of one rank over
    those of a rank alone."""

    name: str
    ranks: int
    forecast: Forecast | None
    scaling: float = 0.0
    why: str = ""


def simulate(table_set: TableSet, topology: Topology, ranks: Sequence[int] = (1, 8, 128), batch: int | None = None) -> list[Simulated]:
    """The set at ``batch`` samples a rank (its own if ``None``), on machines as in ``topology``. One rank alone is given all the memory it needs:
    it is what the others are compared with."""
    facts = table_set.facts(batch)
    alone = place(facts, replace(topology.with_ranks(1), memory_gib=1e9))
    found = []
    for count in ranks:
        where = topology.with_ranks(count)
        try:
            forecast = alone if count == 1 else place(facts, where)
        except PlanError as error:
            found.append(Simulated(table_set.name, count, None, why=str(error)))
            continue
        found.append(Simulated(table_set.name, count, forecast, alone.step / forecast.step))
    return found


def sets_named(names: Sequence[str]) -> list[TableSet]:
    """The sets of these names, all if there are none. Raises :class:`PlanError` for an unknown one."""
    for name in names:
        if name not in SETS:
            raise PlanError(f"there is no table set '{name}'{nearest(name, SETS)}. Known: {', '.join(SETS)}")
    return [SETS[name] for name in names or SETS]


def page(found: Sequence[Simulated]) -> str:
    """A line for each set and number of ranks."""
    rows = [("SET", "RANKS", "STEP MS", "SAMPLES/S", "BALANCE", "SCALING", "LOOKUPS MS", "WIRE MS", "DENSE MS", "FULLEST RANK")]
    notes = []
    for s in found:
        if s.forecast is None:
            rows.append((s.name, str(s.ranks), "does not fit", *[""] * 7))
            notes.append(f"{s.name} on {s.ranks}: {s.why}")
            continue
        f, p = s.forecast, s.forecast.phases
        rows.append((
            s.name, str(s.ranks), f"{f.step * 1e3:.3f}", f"{f.samples * s.ranks / f.step:,.0f}", f"{100 * f.balance:.1f} %",
            f"{100 * s.scaling:.0f} %", f"{1e3 * (p['lookup'] + p['update'] + p['merge']):.3f}",
            f"{1e3 * (p['ids'] + p['results'] + p['gradients'] + p['all-reduce']):.3f}", f"{1e3 * p['dense']:.3f}", size(max(r["held"] for r in f.ranks)),
        ))  # fmt: skip
    return "\n".join([*columns(rows), *notes])
