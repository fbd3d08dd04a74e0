"""The planner's commands: ``estimate``, ``simulate`` and ``topology``."""
from __future__ import annotations

import argparse
import sys

from ..errors import PlanError


def add_commands(commands, factory_help: str) -> None:
    """Add them to the command line."""
    estimate = commands.add_parser(
        "estimate", help="does a model fit on a topology, how fast is it, and what bounds it; nothing of its size is allocated",
        epilog=factory_help.partition("Exit code")[0] + "The batch is one rank's. A model on the meta device is best: nothing is allocated.\n\n"
        "Exit code: 0 if it fits, 1 if it does not, 2 if the target or the topology is not usable.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    estimate.add_argument("target", metavar="MODULE:FACTORY")
    estimate.add_argument("--topology", required=True, help="a preset (8xa100, 16x8xh100) or a .yaml file")
    estimate.add_argument("--optimizer", help="of the tables: sgd, adagrad, rowwise_adagrad or adam")
    estimate.add_argument("--plan", help="a plan (.yaml, .json) whose entries the result agrees with")
    estimate.add_argument("--meta", action="store_true", help="call FACTORY with the meta device as default; ids are then counted as uniform")
    estimate.add_argument("--save", metavar="PLAN.yaml", help="write the plan there")
    estimate.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="passed to the factory as a keyword")
    estimate.set_defaults(run=_estimate)
    simulate = commands.add_parser("simulate", help="predicted steps of published table sets on 1, 8 and 128 ranks")
    simulate.add_argument("sets", nargs="*", metavar="SET", help="default: all")
    simulate.add_argument("--topology", default="16x8xh100", help="the kind of machine (default 16x8xh100)")
    simulate.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 128])
    simulate.add_argument("--batch", type=int, help="samples of one rank (default: the set's own)")
    simulate.set_defaults(run=_simulate)
    topology = commands.add_parser("topology", help="measure this machine: memory, lookups, products, and gloo between processes")
    topology.add_argument("--processes", type=int, default=2, help="ranks (default 2)")
    topology.add_argument("--save", metavar="TOPOLOGY.yaml", help="write it there too")
    topology.set_defaults(run=_topology)


def _estimate(args: argparse.Namespace) -> int:
    from contextlib import nullcontext

    import torch

    from ..cli import TargetError, case_of, find, option
    from ..plan import Plan
    from .auto import fits, place, plan_of
    from .model_facts import read_model
    from .topology import Topology

    where = Topology.load(args.topology)
    constraints = Plan.load(args.plan) if args.plan else Plan()
    found = find(args.target)
    if len(found) != 1:
        raise TargetError(f"{args.target} names {len(found)} models; one was needed: {', '.join(name for name, _ in found[:4])}")
    with torch.device("meta") if args.meta else nullcontext():
        case = case_of(*found[0], dict(option(text) for text in args.option))
    facts = read_model(case.model, case.batches[0], case.kwargs, plan=constraints, optimizer=args.optimizer)
    try:
        fits(facts, where)
        forecast = place(facts, where)
    except PlanError as error:
        print(f"does not fit: {error}")
        return 1
    print(forecast)
    fullest = max(r["held"] for r in forecast.ranks) / where.memory
    print(f"fits: the fullest rank uses {100 * fullest:.0f} % of its memory; the step is bound by {forecast.bound}")
    if args.save:
        plan = plan_of(forecast, constraints)
        object.__setattr__(plan, "forecast", forecast)
        plan.save(args.save)
    return 0


def _simulate(args: argparse.Namespace) -> int:
    from .simulate import page, sets_named, simulate
    from .topology import Topology

    where = Topology.load(args.topology)
    found = []
    for table_set in sets_named(args.sets):
        print(f"{table_set.name} ...", file=sys.stderr, flush=True)
        found += simulate(table_set, where, args.ranks, args.batch)
    print(page(found))
    return 0


def _topology(args: argparse.Namespace) -> int:
    from .measure_topology import measure

    found = measure(args.processes)
    print(found.to_yaml(), end="")
    if args.save:
        found.save(args.save)
    return 0
