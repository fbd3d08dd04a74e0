"""The planner against a lower bound, and against TorchRec's planner under TorchRec's own cost model.

    python benchmarks/planner.py bound                # needs scipy
    python benchmarks/planner.py torchrec             # needs torchrec 1.8; both planners see the same options, costs and memory
    python benchmarks/planner.py bound --sets mlperf_dlrm_dcnv2 --topologies 8xh100

``bound`` prints for each public table set the slowest rank of our plan, the bound (``planner_bound.py`` says how it is built) and the time of
the search. ``torchrec`` lets TorchRec enumerate and rate every way of sharding each table (fused and dense kernels), runs its planner with
its default proposers and partitioner, gives the same ways with the same costs to our search, and has both results rated by TorchRec's own
model (the largest sum of shard times on a rank). Where a table set needs more memory than there is, the line says so.
"""
from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tablewright.rewriter.errors import PlanError
from tablewright.rewriter.planner.auto import problem_of
from tablewright.rewriter.planner.forecast import columns
from tablewright.rewriter.planner.option import Option
from tablewright.rewriter.planner.search import search
from tablewright.rewriter.planner.table_sets import SETS, TableSet
from tablewright.rewriter.planner.topology import Topology

TOPOLOGIES = ("8xh200", "2x8xh200", "16x8xh200")


def bound(table_set: TableSet, where: Topology) -> tuple[str, ...]:
    """One line: our plan beside the bound."""
    from planner_bound import lower_bound

    facts = table_set.facts()
    options, held, _ = problem_of(facts, where)
    start = time.process_time()
    try:
        found = search(options, where.ranks, where.memory, base_memory=held)
    except PlanError:
        return table_set.name, where.name, str(len(facts.tables)), "does not fit", "", "", "", ""
    taken = time.process_time() - start
    least = lower_bound(options, where.ranks, where.memory, base_memory=held)
    return (
        table_set.name, where.name, str(len(facts.tables)), f"{found.slowest * 1e3:.4f}", f"{least * 1e3:.4f}",
        f"{100 * (found.slowest / least - 1):.2f} %", f"{100 * found.load.mean() / found.slowest:.1f} %", f"{taken:.2f}",
    )  # fmt: skip


BOUND = ("SET", "TOPOLOGY", "TABLES", "SLOWEST MS", "BOUND MS", "ABOVE BOUND", "BALANCE", "SEARCH CPU S")


def torchrec(table_set: TableSet, where: Topology) -> tuple[str, ...]:
    """One line: both planners' plans, rated by TorchRec."""
    import torch
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
    from torchrec.distributed.embedding_types import EmbeddingComputeKernel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner
    from torchrec.distributed.planner import Topology as Theirs
    from torchrec.distributed.planner.perf_models import NoopPerfModel
    from torchrec.distributed.planner.types import ParameterConstraints, PlannerError

    logging.disable(logging.ERROR)
    tables = [(f"t{g}_{i}", t) for g, t in enumerate(table_set.groups) for i in range(t.count)]
    module = EmbeddingBagCollection(
        [EmbeddingBagConfig(name=n, num_embeddings=t.rows, embedding_dim=t.dim, feature_names=[f"f_{n}"]) for n, t in tables],
        device=torch.device("meta"),
    )
    kernels = [EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value]
    constraints = {n: ParameterConstraints(compute_kernels=kernels, pooling_factors=[float(t.ids)]) for n, t in tables}
    theirs = Theirs(
        world_size=where.ranks, local_world_size=where.ranks_per_node, compute_device="cuda", hbm_cap=int(where.memory_gib * 1024**3),
        hbm_mem_bw=where.memory_gb_s * 1e9 / 1e3, intra_host_bw=where.intra_node_gb_s * 1e9 / 1e3, inter_host_bw=where.inter_node_gb_s * 1e9 / 1e3,
    )  # fmt: skip
    sharders = [EmbeddingBagCollectionSharder()]
    planner = EmbeddingShardingPlanner(topology=theirs, batch_size=table_set.batch, constraints=constraints)
    head = table_set.name, where.name, str(len(tables))
    start = time.process_time()
    try:
        planner.plan(module, sharders)
    except PlannerError as error:
        return *head, f"no plan ({str(error).splitlines()[0][:60]})", "", "", "", ""
    theirs_seconds = time.process_time() - start
    model = NoopPerfModel(theirs)
    rating = model.rate(planner._best_plan)
    room = planner._storage_reservation.reserve(theirs, table_set.batch, module, sharders, constraints).devices[0].storage.hbm
    ways = planner._enumerator.enumerate(module, sharders)
    by_table: dict[str, list] = {}
    for way in ways:
        by_table.setdefault(way.name, []).append(way)
    options = [[o for way in of if (o := _option(way, where)) is not None] for of in by_table.values()]
    start = time.process_time()
    found = search(options, where.ranks, float(room))
    ours_seconds = time.process_time() - start
    plan = []
    for of, index, places in zip(options, found.chosen, found.places):
        way = copy.deepcopy(of[index].label)
        for k, shard in enumerate(way.shards):
            shard.rank = places[k // of[index].width] + k % of[index].width
        plan.append(way)
    ours = model.rate(plan)
    held = np.zeros(where.ranks)
    for way in plan:
        for shard in way.shards:
            held[shard.rank] += shard.storage.hbm
    assert held.max() <= room, "our plan needs more memory than TorchRec allows"
    assert ours <= rating * (1 + 1e-9), f"{table_set.name}: TorchRec's plan is better, {rating} against {ours}"
    return *head, f"{rating:.4f}", f"{ours:.4f}", f"{rating / ours:.3f}", f"{theirs_seconds:.1f}", f"{ours_seconds:.1f}"


TORCHREC = ("SET", "TOPOLOGY", "TABLES", "TORCHREC'S PLAN, ITS MS", "OUR PLAN, ITS MS", "THEIRS / OURS", "THEIR CPU S", "OUR CPU S")


def _option(way, where: Topology) -> Option | None:
    """TorchRec's way as ours: the same seconds and bytes; ``None`` for one that needs several shards on one rank, which ours never does."""
    costs, memory = [s.perf.total for s in way.shards], [float(s.storage.hbm) for s in way.shards]
    if len(costs) > where.ranks:
        return None
    width = {"uniform": where.ranks, "host": where.ranks_per_node, "multi_host": where.ranks_per_node, "device": 1}[way.partition_by]
    if len(costs) % width:
        return None
    return Option(costs, memory, width, label=way)


def main() -> None:
    """Run one of the two comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bound", "torchrec"))
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    run: Callable[[TableSet, Topology], tuple[str, ...]] = bound if args.what == "bound" else torchrec
    rows = [BOUND if args.what == "bound" else TORCHREC]
    for name in args.sets:
        for topology in args.topologies:
            rows.append(run(SETS[name], Topology.load(topology)))
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    print("\n".join(columns(rows)))


if __name__ == "__main__":
    main()
