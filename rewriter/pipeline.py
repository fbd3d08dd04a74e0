"""Run the passes in order; check the graph after each; roll back what fails; keep a record of every step."""
from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.fx import Graph

from ..passes.graph import packet_name
from ..passes.recompute_modules import CannotRecompute
from ..passes.records import APPLIED, DISABLED, REJECTED, Record
from ..passes.rule import Context, Pass
from ..passes.shard_tables import CannotShard, Sharding
from ..passes.table_gradients import CannotUpdate
from ..passes.tier_tables import CannotTier, Tier
from .errors import PassError, PlanError, VerifyError
from .plan import Disabled
from .verify import check_structure, copy_graph

Check = Callable[[Graph, Graph], None]


@dataclass(frozen=True)
class Step:
    """One pass: what it did to the graph and how long it took. ``before`` and ``after`` are copies nobody changes."""

    name: str
    status: str  # "ran", REJECTED or DISABLED
    records: tuple[Record, ...]
    seconds: float
    verify_seconds: float
    before: Graph
    after: Graph
    made: int = 0  # how many rewrites

    @property
    def op_delta(self) -> dict[str, int]:
        """How many more (or fewer) calls of each op there are after the pass."""
        was, now = (Counter(packet_name(n) for n in g.nodes if n.op == "call_function") for g in (self.before, self.after))
        return {op: now[op] - was[op] for op in sorted({*was, *now}) if now[op] != was[op]}


def run_passes(
    graph: Graph, shell: nn.Module, passes: list[Pass | Disabled], tables: dict, *, budget: int | None = None,
    numeric_check: Check | None = None, sharding: Sharding | None = None, tiers: Mapping[str, Tier] | None = None, timings: dict | None = None,
) -> tuple[Graph, list[Step]]:  # fmt: skip
    """The rewritten graph and a :class:`Step` for each pass; ``graph`` itself is not changed.

    ``budget``: at most so many rewrites in all. ``numeric_check(before, after)`` raises :class:`VerifyError` on a difference;
    then, as on a structural fault, that pass is rolled back. ``sharding``: where tables live, over several ranks; graphs that exchange
    with other ranks are not checked by numbers. ``timings``: what ``measure.py`` timed in earlier runs, so that the same rewrites are made
    again. Raises :class:`PassError` if a pass itself breaks.
    """
    steps: list[Step] = []
    made, timings = 0, {} if timings is None else timings
    elsewhere = () if sharding is None else {n for n, t in sharding.layouts.items() if not t.replicated and t.on(sharding.rank) is None}
    for item in passes:
        if isinstance(item, Disabled):
            found = _what_it_would_do(item, graph, shell, tables, timings)
            steps.append(Step(item.cls.name, DISABLED, found, 0.0, 0.0, graph, graph))
            continue
        started = time.perf_counter()
        context = Context(copy_graph(graph), shell, tables, None if budget is None else budget - made, 0, timings, sharding, tiers)
        try:
            records = item.run(context)
        except CannotUpdate as error:
            failed = next((r.reason for s in steps if s.status == REJECTED for r in s.records), "")
            raise PlanError(f"{error}. {failed}" if failed else str(error)) from None
        except (CannotRecompute, CannotShard, CannotTier) as error:
            raise PlanError(str(error)) from None
        except Exception as error:
            done = ", ".join(s.name for s in steps) or "none"
            raise PassError(
                f"pass '{item.name}' broke ({type(error).__name__}: {error}); passes run before it: {done}. "
                f"Turn it off with passes: {{{item.name}: false}} in the plan, and report this"
            ) from error
        ran = time.perf_counter()
        status, after = "ran", context.graph
        if context.made:
            try:
                check_structure(graph, after, shell, elsewhere)
                if numeric_check is not None and item.alone:
                    numeric_check(graph, after)
            except VerifyError as error:
                if not item.alone:  # without it the model does not run at all
                    raise PassError(f"the check after pass '{item.name}' failed: {error}. Please report this") from error
                reason = f"the check after the pass failed, so it was rolled back: {error}"
                records = [replace(r, status=REJECTED, reason=reason) if r.status == APPLIED else r for r in records]
                status, after = REJECTED, graph
        kept = context.made if status == "ran" else 0
        made += kept
        steps.append(Step(item.name, status, tuple(records), ran - started, time.perf_counter() - ran, graph, after, kept))
        graph = after
    return graph, steps


def _what_it_would_do(item: Disabled, graph: Graph, shell: nn.Module, tables: dict, timings: dict) -> tuple[Record, ...]:
    """What a disabled pass finds, so that the report still counts it; on a copy that is thrown away. A pass that breaks may
    well be why it is disabled."""
    try:
        records = item.cls().run(Context(copy_graph(graph), shell, tables, timings=timings))
    except CannotUpdate:
        return ()
    except Exception:
        return (Record(item.cls.kind, DISABLED, "", item.cls.name, item.reason),)
    return tuple(replace(r, status=DISABLED, reason=item.reason, detail="") if r.status == APPLIED else r for r in records)
