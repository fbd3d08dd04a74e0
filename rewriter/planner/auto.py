"""The planner: from the facts of tables and a topology to a plan with its forecast."""
from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import PlanError, TablewrightError
from ..plan import Plan, TablePlan
from .costs import options_of
from .forecast import Forecast, Placed, exposed_all_reduce
from .model_facts import ModelFacts, read_model
from .option import Option, size
from .search import Assignment, refuse_what_cannot_fit, search
from .topology import Topology, here

if TYPE_CHECKING:
    from ..sharding import Ranks


def place(facts: ModelFacts, topology: Topology) -> Forecast:
    """The best placement found. Raises :class:`PlanError` naming the table where one does not fit, or the largest where all do not."""
    options, base, load = problem_of(facts, topology)
    names = [t.name for t in facts.tables]
    found = search(options, topology.ranks, topology.memory, names=names, base_load=load, base_memory=base)
    return forecast_of(facts, topology, options, found)


def problem_of(facts: ModelFacts, topology: Topology) -> tuple[list[list[Option]], float, float]:
    """The ways of each table, and the bytes and seconds of each rank besides tables."""
    load = facts.forward.seconds(topology.rates) + facts.backward.seconds(topology.rates)
    load += exposed_all_reduce(topology, facts.gradients, facts.backward)
    return [options_of(t, topology, facts.wishes.get(t.name)) for t in facts.tables], facts.held, load


def fits(facts: ModelFacts, topology: Topology) -> None:
    """Raises :class:`PlanError` where no placement can hold the model; quicker than :func:`place`."""
    options, base, _ = problem_of(facts, topology)
    refuse_what_cannot_fit(options, topology.ranks, topology.memory - base, [t.name for t in facts.tables])


def forecast_of(facts: ModelFacts, topology: Topology, options: Sequence[Sequence[Option]], found: Assignment) -> Forecast:
    """What an assignment costs."""
    placed = []
    room = topology.memory - facts.held
    slowest = found.slowest
    for table, of, chosen, starts in zip(facts.tables, options, found.chosen, found.places):
        option = of[chosen]
        wish = facts.wishes.get(table.name) or TablePlan()
        ranks = tuple(start + i for start in starts for i in range(option.width))
        if wish.ranks is not None and option.label.sharding != "data_parallel":
            ranks = wish.ranks
        others = [o for o in of if (o.label.sharding, o.label.exchange) != (option.label.sharding, option.label.exchange)]
        runner_up = min(others, key=lambda o: o.mean(topology.ranks), default=None)
        placed.append(Placed(table, option, ranks, runner_up, _why(option, of, topology, room, slowest, wish)))
    return Forecast(topology, placed, facts.samples, facts.forward, facts.backward, facts.gradients, facts.held, list(facts.notes))


def _why(option: Option, of: Sequence[Option], topology: Topology, room: float, slowest: float, wish: TablePlan) -> str:
    ranks = topology.ranks
    if len(of) == 1:
        return "the plan says so" if wish.sharding else "the only way"
    cheapest = min(of, key=lambda o: o.mean(ranks))
    within = " of what the plan allows" if wish.sharding or wish.exchange not in (None, "auto") else ""
    if option is cheapest:
        return f"cheapest{within}"
    more = f"{100 * (option.mean(ranks) / cheapest.mean(ranks) - 1):.0f} % more than {cheapest.label}, which "
    if cheapest.largest_memory > room:
        return more + f"needs {size(cheapest.largest_memory)} on one rank"
    if cheapest.largest > slowest:
        return more + f"takes {cheapest.largest * 1e3:.2f} ms on one rank"
    if cheapest.mean_memory(ranks) > option.mean_memory(ranks) * 1.01:
        return more + f"holds {size((cheapest.mean_memory(ranks) - option.mean_memory(ranks)) * ranks)} more"
    return more + "would leave ranks less even"


def plan_of(forecast: Forecast, constraints: Plan) -> Plan:
    """The placement as a plan: an entry for each table before those of ``constraints``, which keep their other keys."""
    entries: dict[str, TablePlan] = {}
    for p in forecast.placed:
        path = glob.escape(p.facts.name.removesuffix(".weight"))
        way = p.way
        everywhere = way.sharding == "data_parallel"
        ranks = None if everywhere or p.ranks == tuple(range(forecast.topology.ranks)) and way.sharding == "row_wise" else p.ranks
        given = constraints.tables.get(path, TablePlan())
        split = given.split or ("sample" if way.split == "sample" else None)
        entries[path] = replace(given, sharding=way.sharding, ranks=ranks, exchange=None if everywhere else way.exchange, split=split)
    rest = {key: entry for key, entry in constraints.tables.items() if key not in entries}
    return replace(constraints, tables={**entries, **rest})


def auto_plan(model: Any, topology: Any, sample_inputs: Any, sample_kwargs: Any, optimizer: Any, constraints: Plan | None) -> Plan:
    """``Plan.auto`` for several ranks: the plan, with its forecast as ``plan.forecast``."""
    constraints = constraints or Plan()
    where = Topology.load(topology)
    facts = read_model(model, sample_inputs, sample_kwargs, plan=constraints, optimizer=optimizer)
    forecast = place(facts, where)
    plan = plan_of(forecast, constraints)
    object.__setattr__(plan, "forecast", forecast)
    return plan


def plan_over(model: nn.Module, ranks: Ranks, args: Any, kwargs: Any, optimizer: Any) -> Plan:
    """What ``plan="auto"`` means over several ranks: rank 0 plans for this kind of machine (:func:`~.topology.here`) on its own batch, and all
    ranks take its plan. Raises :class:`PlanError` on every rank where it cannot."""
    found: list[Any] = [None]
    if ranks.rank == 0:
        try:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            where = here(ranks.world, ranks.world // ranks.per_node, device)
            found = [auto_plan(model, where, args, kwargs, optimizer, None).to_dict()]
        except TablewrightError as error:
            found = [str(error)]
    dist.broadcast_object_list(found, src=dist.get_global_rank(ranks.group, 0), group=ranks.group)
    if isinstance(found[0], str):
        raise PlanError(f"plan='auto' found no plan for {ranks.world} ranks: {found[0]}. Pass a plan that says where tables go")
    return Plan.from_dict(found[0])
