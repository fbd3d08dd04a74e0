"""Train DLRM over several processes: tables spread over the ranks, the rest data-parallel.

    torchrun --nproc-per-node 2 examples/train_dlrm_sharded.py                            # on Criteo-like rows that it writes
    torchrun --nproc-per-node 2 examples/train_dlrm_sharded.py --data train.txt           # Criteo's Kaggle file (.gz works too)
    torchrun --nproc-per-node 4 examples/train_dlrm_sharded.py --sharding row_wise --checkpoint /tmp/dlrm --steps 200
    torchrun --nproc-per-node 2 examples/train_dlrm_sharded.py --checkpoint /tmp/dlrm --resume --steps 300     # on fewer ranks

The model is in dlrm.py and knows nothing of all this. Every rank reads its own rows (each takes every n-th batch). `--check` also trains
the plain model on one rank, on the batches of all ranks, and exits with 1 if the losses differ.
"""

import argparse
import copy
import itertools
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import criteo
import tablewright as tw
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from dlrm import DLRM
from torch.distributed.device_mesh import init_device_mesh

REAL_ROWS = Path(__file__).resolve().parents[2] / "shared" / "data" / "criteo_sample.txt"


def main() -> int:
    args = parse_arguments()
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=args.timeout))
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device, (world,))
    path = data_file(args, rank)
    tables = [args.rows_per_table] * 26

    def batches(share: int, of: int):
        """Every ``of``-th batch from the ``share``-th on, again and again."""
        while True:
            read = criteo.read_batches(path, tables, args.batch_size)
            for dense, ids, labels in itertools.islice(read, share, None, of):
                if len(labels) == args.batch_size:
                    yield dense.to(device), ids.to(device), labels.to(device)

    torch.manual_seed(args.seed)
    model = DLRM(tables, dim=args.dim, bottom=(64, 32), top=(64, 32)).to(device)
    plain = copy.deepcopy(model) if args.check and rank == 0 else None
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    mine = batches(rank, world)
    dense, ids, labels = next(mine)

    # ---- All that changes in a plain training script: ------------------------------------------------------------
    plan = tw.Plan.load(args.plan) if args.plan else {"version": 1, "tables": {"*": {"sharding": args.sharding, "exchange": args.exchange}}}
    model, optimizer = tw.optimize(model, plan, optimizer=optimizer, sample_inputs=(dense, ids), mesh=mesh)
    # ---------------------------------------------------------------------------------------------------------------
    if rank == 0:
        print(f"{model.report}\n\n{model.resolved_plan}\n", flush=True)

    first = 0
    if args.resume:
        state = {"train": tw.training_state(model, optimizer), "step": 0}
        dcp.load(state, checkpoint_id=args.checkpoint)
        tw.load_training_state(model, optimizer, state["train"])
        first = state["step"]
    losses, started = [], time.perf_counter()
    for step in range(first, args.steps):
        if step > first or args.resume:
            dense, ids, labels = next(mine)
        loss = F.binary_cross_entropy_with_logits(model(dense, ids), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / world)
        if rank == 0 and (step + 1) % max(1, args.steps // 10) == 0:
            rate = len(losses) * args.batch_size * world / (time.perf_counter() - started)
            print(f"step {step + 1:5d}   loss {sum(losses[-10:]) / len(losses[-10:]):.4f}   {rate:,.0f} rows/s", flush=True)
        if args.checkpoint and (step + 1) % args.checkpoint_every == 0:
            dcp.save({"train": tw.training_state(model, optimizer), "step": step + 1}, checkpoint_id=args.checkpoint)
    good = True
    if plain is not None:
        good = check(plain, [batches(r, world) for r in range(world)], losses)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if good else 1


def check(plain: torch.nn.Module, everyone: list, losses: list[float]) -> bool:
    """Train the plain model on the batches of all ranks; whether its losses are those of the sharded one."""
    optimizer = torch.optim.Adagrad(plain.parameters(), lr=0.01)
    worst = 0.0
    for expected in losses:
        parts = []
        for dense, ids, labels in map(next, everyone):
            parts.append(F.binary_cross_entropy_with_logits(plain(dense, ids), labels) / len(everyone))
        loss = sum(parts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        worst = max(worst, abs(float(loss.detach()) - expected))
    print(f"the plain model on one process: largest difference of a loss {worst:.2e} over {len(losses)} steps", flush=True)
    return worst < 1e-3


def data_file(args: argparse.Namespace, rank: int) -> Path:
    """The rows to train on; where none are given, and none are beside the repository, rank 0 writes some like them."""
    if args.data:
        return args.data
    if REAL_ROWS.exists():
        return REAL_ROWS
    path = Path(tempfile.gettempdir()) / f"criteo_like_{args.rows}_{args.seed}.txt"
    if rank == 0 and not path.exists():
        criteo.write_synthetic(path.with_suffix(".part"), args.rows, args.seed)
        path.with_suffix(".part").rename(path)
    dist.barrier()
    return path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="rows in Criteo's Kaggle format")
    parser.add_argument("--rows", type=int, default=40_000, help="how many rows to write where there are none")
    parser.add_argument("--rows-per-table", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=512, help="on each rank")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sharding", default="table_wise", help="see tw.Plan")
    parser.add_argument("--exchange", default="pooled", help="pooled, unique or auto")
    parser.add_argument("--plan", help="a plan file instead of --sharding and --exchange")
    parser.add_argument("--checkpoint", help="folder for torch.distributed.checkpoint")
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--timeout", type=float, default=300, help="seconds until a rank that others wait for counts as lost")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint")
    return args


if __name__ == "__main__":
    sys.exit(main())
