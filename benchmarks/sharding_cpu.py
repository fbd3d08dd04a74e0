"""A sharded DLRM training step over gloo, beside TorchRec's DistributedModelParallel: same processes, tables, ids, optimizer and threads.

    torchrun --nproc-per-node 2 benchmarks/sharding_cpu.py --out benchmarks/results/sharding_cpu.md

26 tables, pooled bags, rowwise AdaGrad updated in the backward (eps 1e-8), the MLPs of MLPerf's DLRM under dense AdaGrad. Both take
their steps in turn and see the same batches from the same weights; the first losses are printed beside each other. Column-wise they may
differ: TorchRec's rowwise AdaGrad then takes the mean over a rank's own columns, ours over the whole row, as one process would.
Beside the wall clock stand the processor milliseconds of rank 0 (all its threads, gloo's too), which other work on the machine disturbs less.
TorchRec does not offer row-wise sharding on CPU; its sharder's list is overridden here. ``--plain``: ours alone, without TorchRec.
"""
from __future__ import annotations

import argparse
import functools
import logging
import os
import platform
import subprocess
import time
import warnings
from datetime import date
from pathlib import Path

import tablewright as tw
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from workload import Bags, Dense, Shape, Whole, draw_ids, interleaved, median_ms


def weights_of(shape: Shape) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [(torch.rand(shape.rows, shape.dim, generator=g) - 0.5) * shape.rows**-0.5 for _ in range(shape.tables)]


def dense_of(shape: Shape) -> Dense:
    torch.manual_seed(7)
    return Dense(shape.tables, shape.dim)


def ours(shape: Shape, sharding: str, data: list, mesh):
    """A step of the optimized model: (loss of batch i)."""
    model = Whole(Bags(weights_of(shape), sparse=False), dense_of(shape))
    rule = {"rowwise_adagrad": {"lr": 0.01, "eps": 1e-8, "in_backward": True}}
    plan = {"version": 1, "embedding_optimizer": rule, "tables": {"*": {"sharding": sharding}}}
    dense, ids, offsets, _ = data[0]
    optimizer = torch.optim.Adagrad(model.dense.parameters(), lr=0.01)
    opt, optimizer = tw.optimize(model, plan, optimizer=optimizer, sample_inputs=(dense, list(ids), offsets), mesh=mesh)

    def step(i: int) -> Tensor:
        dense, ids, offsets, label = data[i % len(data)]
        loss = F.binary_cross_entropy_with_logits(opt(dense, list(ids), offsets), label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def torchrec(shape: Shape, sharding: str, data: list):
    """The same with EmbeddingBagCollection under DistributedModelParallel."""
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

    if sharding == "row_wise":
        EmbeddingBagCollectionSharder.sharding_types = lambda self, device: ["row_wise"]  # not offered on CPU otherwise
    tables, keys = range(shape.tables), [f"f{t}" for t in range(shape.tables)]
    configs = [
        EmbeddingBagConfig(name=f"t{t}", embedding_dim=shape.dim, num_embeddings=shape.rows, feature_names=[keys[t]]) for t in tables
    ]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ebc = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
            self.dense = dense_of(shape)

        def forward(self, dense, kjt):
            values = self.ebc(kjt).values()
            return self.dense(dense, values.view(values.shape[0], shape.tables, shape.dim))

    model = Model()
    apply_optimizer_in_backward(RowWiseAdagrad, model.ebc.parameters(), {"lr": 0.01, "eps": 1e-8})
    constraints = {f"t{t}": ParameterConstraints(sharding_types=[sharding], compute_kernels=["fused"]) for t in tables}
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"), constraints=constraints, batch_size=shape.batch
    )
    sharders = [EmbeddingBagCollectionSharder()]
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    model = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    whole = dict(zip([f"t{t}" for t in tables], weights_of(shape)))
    for name, tensor in model.state_dict().items():
        table = name.split(".")[-2]
        if table in whole:
            for shard in tensor.local_shards():
                (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                shard.tensor.copy_(whole[table][row : row + rows, column : column + columns])
    optimizer = torch.optim.Adagrad([p for n, p in model.named_parameters() if "ebc" not in n], lr=0.01)
    lengths = torch.full((shape.tables * shape.batch,), shape.pooling)
    batches = [(d, KeyedJaggedTensor(keys, torch.cat(list(ids)), lengths=lengths), y) for d, ids, _, y in data]

    def step(i: int) -> Tensor:
        dense, kjt, label = batches[i % len(batches)]
        loss = F.binary_cross_entropy_with_logits(model(dense, kjt), label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def together(step, spent: list[float], i: int) -> None:
    """A step that all ranks begin and end at once; the processor seconds of this rank's threads go to ``spent``."""
    dist.barrier()
    started = time.process_time()
    step(i)
    dist.barrier()
    spent.append(time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shardings", nargs="+", default=["table_wise", "column_wise", "row_wise"])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--pooling", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--batch", type=int, default=1024, help="on each rank")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where ours spends its time")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    lines = [
        "| sharding | pooling | ours, ms | TorchRec, ms | factor | ours, CPU ms | TorchRec, CPU ms | factor | first losses, ours | TorchRec's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for sharding in args.shardings:
        for pooling in args.pooling:
            shape = Shape(26, args.rows, args.dim, pooling, args.batch, batches=8)
            g = torch.Generator().manual_seed(rank)
            offsets = torch.arange(0, shape.batch * pooling, pooling)
            data = [
                (torch.rand(shape.batch, 13, generator=g), ids.unbind(0), offsets, (torch.rand(shape.batch, 1, generator=g) < 0.25).float())
                for ids in draw_ids(shape, seed=rank)
            ]
            steps = {"ours": ours(shape, sharding, data, mesh)}
            if not args.plain:
                steps["torchrec"] = torchrec(shape, sharding, data)
            losses = {name: [round(float(step(i)), 6) for i in range(3)] for name, step in steps.items()}

            spent: dict[str, list[float]] = {name: [] for name in steps}
            calls = {name: functools.partial(together, step, spent[name]) for name, step in steps.items()}
            wall = {name: median_ms(seconds) for name, seconds in interleaved(calls, args.rounds).items()}
            processor = {name: median_ms(seconds[-args.rounds :]) for name, seconds in spent.items()}
            factors = []
            for times in (wall, processor):
                theirs = times.get("torchrec", float("nan"))
                factors.append(f"{times['ours']:.1f} | {theirs:.1f} | {theirs / times['ours']:.2f}")
            lines.append(f"| {sharding} | {pooling} | {' | '.join(factors)} | {losses['ours']} | {losses.get('torchrec', '')} |")
            if rank == 0:
                print(lines[-1], flush=True)
            if args.profile:
                import cProfile
                import pstats

                watched = cProfile.Profile()
                for i in range(10):
                    dist.barrier()
                    watched.enable()
                    steps["ours"](i)
                    watched.disable()
                if rank == 0:
                    pstats.Stats(watched).sort_stats("tottime").print_stats(28)
    if rank == 0 and args.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        head = (
            f"# Sharded DLRM step over gloo, {world} processes of {torch.get_num_threads()} thread, {date.today()}, commit {commit}\n\n"
            f"{platform.processor() or platform.machine()}, torch {torch.__version__}; 26 x {args.rows:,} x {args.dim}, batch {args.batch} on each "
            f"rank, median of {args.rounds} steps in turn. Command: `torchrun --nproc-per-node {world} benchmarks/sharding_cpu.py`\n\n"
        )
        args.out.write_text(head + "\n".join(lines) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
