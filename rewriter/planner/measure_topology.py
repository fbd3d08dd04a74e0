"""Measure this machine as a topology: what each of several processes reaches while all are at work, over gloo.

``memory_gb_s``: a copy of 64 MiB, read and written. ``lookup_gb_s``: rows of 256 bytes summed in bags of 8, from a table of 256 MiB.
``tflops``: products of 512 x 512 matrices. ``intra_node_gb_s``: an all-to-all of 8 MiB, what one rank sends to others. ``message_us``: one of 8 bytes
to each. ``call_us``: an addition of one number; a shard is counted as one call too. The least time of several rounds, and of the ranks the slowest.
"""
from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from ..errors import PlanError
from .topology import GB, GIB, Topology, machine_memory

_ROUNDS = 5
_COPIED, _TABLE_ROWS, _ROW, _BAGS, _EXCHANGED = 64 << 20, 1 << 20, 64, 1 << 13, 8 << 20


def measure(ranks: int, *, timeout: float = 120.0) -> Topology:
    """A topology of ``ranks`` processes of this machine. Raises :class:`PlanError` where the processes cannot be started or end early."""
    if ranks < 1:
        raise PlanError(f"{ranks} processes; at least one was needed")
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_rank, (ranks, folder, timeout), nprocs=ranks)
            found = torch.load(Path(folder) / "measured.pt")
        except Exception as error:
            raise PlanError(f"measuring with {ranks} processes failed: {type(error).__name__}: {str(error).strip().splitlines()[-1]}") from error
    copy, lookup, product, call, exchange, message = found.tolist()
    return Topology(
        ranks=ranks, memory_gib=round(machine_memory() / ranks / GIB, 3), memory_gb_s=round(2 * _COPIED / copy / GB, 3),
        lookup_gb_s=round(8 * _BAGS * _ROW * 4 / lookup / GB, 3), tflops=round(2 * 512**3 / product / 1e12, 5),
        intra_node_gb_s=round(_EXCHANGED * (ranks - 1) / ranks / exchange / GB, 3) if ranks > 1 else round(2 * _COPIED / copy / GB, 3),
        call_us=round(call * 1e6, 3), shard_us=round(call * 1e6, 3), message_us=round(message * 1e6, 1), name=f"{ranks} processes here",
        source="measured over gloo",
    )  # fmt: skip


def _rank(rank: int, ranks: int, folder: str, timeout: float) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))
    try:
        source, target = torch.ones(_COPIED, dtype=torch.uint8), torch.empty(_COPIED, dtype=torch.uint8)
        table = torch.ones(_TABLE_ROWS, _ROW)
        ids = torch.randint(_TABLE_ROWS, (_BAGS, 8))
        matrix, number = torch.ones(512, 512), torch.ones(1)
        sent = torch.ones(_EXCHANGED // 4 // ranks * ranks)
        small = torch.ones(ranks * 2)
        received, answered = torch.empty_like(sent), torch.empty_like(small)
        works: list[Callable[[], object]] = [
            lambda: target.copy_(source), lambda: torch.nn.functional.embedding_bag(ids, table, mode="sum"), lambda: matrix @ matrix,
            lambda: [number + number for _ in range(100)],
            lambda: dist.all_to_all_single(received, sent), lambda: dist.all_to_all_single(answered, small),
        ]  # fmt: skip
        times = torch.tensor([_least(work) for work in works], dtype=torch.float64)
        times[3] /= 100
        dist.all_reduce(times, dist.ReduceOp.MAX)
        if rank == 0:
            torch.save(times, Path(folder) / "measured.pt")
    finally:
        dist.destroy_process_group()


def _least(work: Callable[[], object]) -> float:
    found = []
    for _ in range(_ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)
