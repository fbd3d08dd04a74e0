"""What a placement is predicted to cost, in tables that one can argue with, and beside what was measured."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...passes.cost import Cost
from ..errors import PlanError
from .costs import Way, beside
from .facts import TableFacts
from .option import Option, size
from .topology import Topology

PHASES = ("ids", "lookup", "results", "merge", "dense", "gradients", "update", "all-reduce")
_MOST = 40  # tables in the printed page; all are in ``rows``


@dataclass(frozen=True, eq=False)
class Placed:
    """Where one table went: its way, its ranks in the order of its blocks (empty: every rank), and the next best way."""

    facts: TableFacts
    option: Option
    ranks: tuple[int, ...]
    runner_up: Option | None
    why: str

    @property
    def way(self) -> Way:
        return self.option.label


@dataclass(frozen=True)
class Measured:
    """What a run counted: seconds of a step, and for each rank the bytes it sent in a step and the most it held; seconds of phases
    (names as in ``PHASES``). Absent parts are ``None``."""

    step: float | None = None
    sent: Sequence[float] | None = None
    held: Sequence[float] | None = None
    phases: dict[str, float] | None = None


@dataclass(frozen=True, eq=False)
class Forecast:
    """The prediction for one plan. ``samples``: rows of one rank's batch. ``forward``, ``backward``: of the dense part; ``gradients``: bytes of its
    gradients; ``base``: bytes that each rank holds besides tables."""

    topology: Topology
    placed: list[Placed]
    samples: int = 0
    forward: Cost = Cost()
    backward: Cost = Cost()
    gradients: float = 0.0
    base: float = 0.0
    notes: list[str] = field(default_factory=list)

    # --- numbers -------------------------------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> list[dict[str, float]]:
        """For each rank: seconds of each phase, ``seconds`` in all, bytes ``sent`` in a step, of them ``across`` nodes, bytes ``held``."""
        t, world = self.topology, self.topology.ranks
        phases = {name: np.zeros(world) for name in PHASES}
        sent, across, held = np.zeros(world), np.zeros(world), np.full(world, self.base)
        fixed = 0.0
        for p in self.placed:
            way, on = p.way, np.array(p.ranks, dtype=int)
            held += p.option.everywhere_memory
            sent, across = (total + part for total, part in zip((sent, across), way.sent(on, t)))
            phases["merge"] += way.merge
            fixed += p.option.everywhere - way.merge
            if not len(on):
                continue
            place = np.flatnonzero(np.asarray(p.option.memory)) if p.option.width == world and len(way.rows) < world else np.arange(len(on))
            np.add.at(held, on, np.asarray(p.option.memory)[place])
            for name, values in (("lookup", way.lookup), ("update", way.update)):
                np.add.at(phases[name], on, values)
            for name, (seconds, shared) in zip(("ids", "results", "gradients"), way.seconds(t)):
                np.add.at(phases[name], on, seconds)
                if way.across:
                    beside(phases[name], on, shared, t)
            phases["lookup"] += np.bincount(on, minlength=world) * t.shard_us * 1e-6
        phases["merge"] += fixed
        phases["dense"] += self.forward.seconds(t.rates) + self.backward.seconds(t.rates)
        phases["all-reduce"] += exposed_all_reduce(t, self.gradients, self.backward)
        sent += 2 * self.gradients * (world - 1) / world
        across += 2 * self.gradients / t.ranks_per_node * (t.nodes - 1) / t.nodes
        total = sum(phases.values())
        assert isinstance(total, np.ndarray)
        return [
            {**{name: float(v[r]) for name, v in phases.items()}, "seconds": float(total[r]), "sent": float(sent[r]), "across": float(across[r]),
             "held": float(held[r])}
            for r in range(world)
        ]

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of each phase on the rank that takes longest in it: an exchange ends when the last rank is there."""
        ranks = self.ranks
        return {name: max(r[name] for r in ranks) for name in PHASES}

    @property
    def step(self) -> float:
        """Seconds of a training step: the phases after one another (the all-reduce beside the backward), and the messages' latency."""
        messages = 5 if any(p.ranks and not p.way.across for p in self.placed) else 0
        messages += 10 if any(p.way.across for p in self.placed) else 0
        messages += any(not p.ranks and p.way.gathered for p in self.placed) + bool(self.gradients and self.topology.ranks > 1)
        return sum(self.phases.values()) + messages * self.topology.message_us * 1e-6

    @property
    def slowest(self) -> float:
        """Seconds of the rank that has most to do."""
        return max(r["seconds"] for r in self.ranks)

    @property
    def balance(self) -> float:
        """The mean rank's seconds over the slowest's."""
        seconds = [r["seconds"] for r in self.ranks]
        return float(np.mean(seconds) / max(seconds)) if max(seconds) else 1.0

    @property
    def bound(self) -> str:
        """What takes most of a step, in words."""
        phases = self.phases
        kinds = {
            "the wire (ids, rows and gradients between ranks)": phases["ids"] + phases["results"] + phases["gradients"] + phases["all-reduce"],
            "memory (rows read, summed and updated)": phases["lookup"] + phases["update"] + phases["merge"],
            "the dense part": phases["dense"],
        }
        return max(kinds, key=kinds.__getitem__)

    # --- text ----------------------------------------------------------------------------------------------------------------------

    def rows(self) -> list[tuple[str, ...]]:
        """For each table: name, size, choice, ranks, seconds a rank, runner-up, its seconds, why."""
        world, found = self.topology.ranks, []
        for p in sorted(self.placed, key=lambda p: -p.option.mean(world)):
            other = "" if p.runner_up is None else str(p.runner_up.label)
            ranks = "all" if not p.ranks or len(p.ranks) == world else ranks_text(p.ranks)
            found.append((
                p.facts.name, f"{p.facts.rows:,} x {p.facts.dim}", size(p.facts.bytes), f"{p.facts.ids:,.0f}", f"{p.facts.unique:,.0f}",
                str(p.way), ranks, f"{p.option.mean(world) * 1e6:,.1f}", other,
                "" if p.runner_up is None else f"{p.runner_up.mean(world) * 1e6:,.1f}", p.why,
            ))  # fmt: skip
        return found

    def __str__(self) -> str:
        t = self.topology
        lines = [f"{len(self.placed)} tables on {t.ranks} ranks{f' ({t.name})' if t.name else ''}, {self.samples:,} samples a rank"]
        head = ("TABLE", "SIZE", "HELD", "IDS", "UNIQUE", "CHOICE", "RANKS", "US A RANK", "RUNNER-UP", "US A RANK", "WHY")
        rows = self.rows()
        lines += columns([head, *rows[:_MOST]])
        if len(rows) > _MOST:
            lines.append(f"... and {len(rows) - _MOST} smaller tables: forecast.rows()")
        lines += ["", *self._ranks_text(), "", self.summary()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _ranks_text(self) -> list[str]:
        ranks = self.ranks
        order = sorted(range(len(ranks)), key=lambda r: -ranks[r]["seconds"])
        shown = order if len(order) <= 16 else [*order[:8], *order[-4:]]
        names = [name for name in PHASES if any(r[name] > 0 for r in ranks)]
        nodes = self.topology.nodes > 1
        table = [("RANK", "MS", *(n.upper() for n in names), "SENT", *["ACROSS NODES"] * nodes, "HELD", "OF MEMORY")]
        for r in shown:
            v = ranks[r]
            table.append((
                str(r), f"{v['seconds'] * 1e3:.3f}", *(f"{v[n] * 1e3:.3f}" for n in names), size(v["sent"]), *[size(v["across"])] * nodes, size(v["held"]),
                f"{100 * v['held'] / self.topology.memory:.0f} %",
            ))  # fmt: skip
        lines = columns(table)
        if len(shown) < len(order):
            lines.insert(9, f"... {len(order) - len(shown)} ranks between")
        return lines

    def summary(self) -> str:
        """The step in one sentence."""
        rate = f", {self.samples * self.topology.ranks / self.step:,.0f} samples/s" if self.samples else ""
        return (
            f"predicted step {self.step * 1e3:.3f} ms{rate}; balance {100 * self.balance:.1f} %; most of it is {self.bound}; "
            f"fullest rank {size(max(r['held'] for r in self.ranks))} of {size(self.topology.memory)}"
        )

    def beside(self, measured: Measured) -> str:
        """Predicted beside measured, for each part that was measured. Raises :class:`PlanError` where it is of another number of ranks."""
        table = [("", "PREDICTED", "MEASURED", "MEASURED / PREDICTED")]

        def add(what: str, predicted: float, found: float, text) -> None:
            table.append((what, text(predicted), text(found), f"{found / predicted:.2f}" if predicted else "-"))

        def ms(seconds: float) -> str:
            return f"{seconds * 1e3:.3f} ms"

        if measured.step is not None:
            add("step", self.step, measured.step, ms)
        for name, seconds in (measured.phases or {}).items():
            if name not in PHASES:
                raise PlanError(f"phases has no '{name}'. Known: {', '.join(PHASES)}")
            add(name, self.phases[name], seconds, ms)
        for what, found in (("sent", measured.sent), ("held", measured.held)):
            if found is None:
                continue
            if len(found) != self.topology.ranks:
                raise PlanError(f"{what} has {len(found)} numbers; the forecast is for {self.topology.ranks} ranks, one for each was needed")
            for r, (v, count) in enumerate(zip(self.ranks, found)):
                add(f"rank {r} {what}", v[what], count, size)
        return "\n".join(columns(table))


def exposed_all_reduce(topology: Topology, gradients: float, backward: Cost) -> float:
    """Seconds of the dense gradients' all-reduce that the backward does not hide."""
    return max(0.0, topology.all_reduce(gradients) - backward.seconds(topology.rates))


def ranks_text(ranks: Sequence[int]) -> str:
    """``0-3, 6`` for neighbours, in the order given otherwise."""
    if list(ranks) == sorted(ranks):
        runs: list[list[int]] = []
        for r in ranks:
            if runs and r == runs[-1][1] + 1:
                runs[-1][1] = r
            else:
                runs.append([r, r])
        parts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    else:
        parts = [str(r) for r in ranks]
    return ", ".join(parts) if len(parts) <= 8 else ", ".join([*parts[:6], f"... {len(parts) - 6} more"])


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the cells of each column below one another."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
