"""What ranks do in the tests of exports from several processes; run on every rank."""
from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import tablewright as tw
import torch
from sharding_cases import Case, mesh_of
from tablewright.rewriter.serving import manifest as manifests
from tablewright.rewriter.serving import rank_work, table_sources
from tablewright.rewriter.serving.rows_writer import Files
from torch import nn

SHARDINGS = {
    "user": "row_wise", "tags": "column_wise", "short": "table_wise", "tiny": "data_parallel", "wide": "grid_shard", "item": "table_row_wise",
}  # fmt: skip
ROWS = {"user": 23, "tags": 17, "short": 11, "tiny": 3, "wide": 19, "item": 13}


class Small(nn.Module):
    """Six tables for six ways of sharding, of two dtypes; one is read twice; a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.tags = nn.Embedding(23, 8, padding_idx=0), nn.EmbeddingBag(17, 6, mode="mean")
        self.short, self.tiny = nn.Embedding(11, 5).bfloat16(), nn.Embedding(3, 8)
        self.wide, self.item = nn.EmbeddingBag(19, 7, mode="sum"), nn.Embedding(13, 4)
        self.norm, self.last = nn.BatchNorm1d(38), nn.Linear(38, 1)

    def forward(self, user, friend, tags, short, tiny, wide, item):
        rows = [self.user(user) * self.user(friend), self.tags(tags), self.short(short).float(), self.tiny(tiny), self.wide(wide), self.item(item)]
        return self.last(self.norm(torch.cat(rows, 1))).squeeze(1)


def small_batch(rows: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((23, (rows,)), (23, (rows,)), (17, (rows, 2)), (11, (rows,)), (3, (rows,)), (19, (rows, 2)), (13, (rows,)))
    return tuple(torch.randint(0, high, shape, generator=g) for high, shape in shapes)


def trained(rank: int, world: int, mesh, sharding: str = "mixed"):
    """A model over the ranks after a step, of which each rank had another batch."""
    torch.manual_seed(rank)
    tables = {"*": {"sharding": sharding}} if sharding != "mixed" else {n: {"sharding": s} for n, s in SHARDINGS.items()}
    plan = {"version": 1, "tables": tables, "embedding_optimizer": {"sgd": {"lr": 0.5}}}
    nodes = "grid_shard" if sharding == "mixed" else sharding
    model = tw.optimize(Small(), plan, sample_inputs=small_batch(6), mesh=mesh_of(Case(nodes, "", "", "", "", world), mesh))
    step(model, 7 + rank)
    return model


def step(model, seed: int) -> None:
    model(*small_batch(6, seed)).sum().backward()
    model.embedding_optimizer.step()
    model.embedding_optimizer.zero_grad()


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def export_both(rank: int, world: int, mesh, folder: str, sharding: str = "mixed", row_dtype="float32", delta: bool = True) -> None:
    """What the ranks write is what the whole model in one process writes, byte by byte; so is a delta of it after one more step."""
    model = trained(rank, world, mesh, sharding).eval()
    spread, alone = Path(folder) / "spread" / "m", Path(folder) / "alone" / "m"
    options = {"shards": world, "row_dtype": row_dtype, "missing": {"tags": "mean", "item": "mean"}, "version": "one"}
    with few_at_a_time() as asked:
        assert tw.export_serving(model, small_batch(3) if rank == 0 else None, spread, **options) == spread / "one"
        assert all(count < ROWS[name.split(".")[0]] for name, count in asked), "a table was asked for as a whole"
    plain = model.unoptimized()
    compare(rank, spread / "one", lambda: tw.export_serving(plain, small_batch(3), alone, **options))
    if delta:
        model.train()
        step(model, 40 + rank)
        model.eval()
        with few_at_a_time():
            found = tw.export_delta(model, small_batch(3), spread, version="two")
        plain = model.unoptimized()
        compare(rank, found, lambda: tw.export_delta(plain, small_batch(3), alone, version="two"))
    if rank == 0:
        manifests.read(spread).verify("full")
        assert tw.check_parity(plain, spread).ok


@contextlib.contextmanager
def few_at_a_time():
    """Chunks of a few rows. Yields what rows of which tables were asked for, by name and number."""
    whole, rows_of, asked = table_sources.CHUNK_BYTES, rank_work.RankWork.rows_of, []
    table_sources.CHUNK_BYTES = 4 * 8 * 2
    rank_work.RankWork.rows_of = lambda self, name, ids: asked.append((name, len(ids))) or rows_of(self, name, ids)
    try:
        yield asked
    finally:
        table_sources.CHUNK_BYTES, rank_work.RankWork.rows_of = whole, rows_of


def compare(rank: int, spread: Path, export) -> None:
    if rank == 0:
        one, other = files_of(spread), files_of(export())
        assert list(one) == list(other)
        different = [name for name in one if one[name] != other[name]]
        assert not different, different


def export_fails(rank: int, world: int, mesh, folder: str, how: str) -> str:
    """Something goes wrong on the last rank, or on the first one; every rank's error."""
    home, model = Path(folder) / how, trained(rank, world, mesh).eval()
    failing = rank == (0 if how == "first" else world - 1)
    write, done = Files.write, []

    def fails(self, file, offset, content):
        done.append(len(content))
        if failing and sum(map(bool, done)) == 3:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("no space left on device")
        write(self, file, offset, content)

    Files.write = fails
    try:
        with few_at_a_time():
            tw.export_serving(model, small_batch(5) if how != "sample" else (torch.zeros(3),), home)
    except (tw.ExportError, tw.PeerError, tw.CaptureError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Files.write = write
    return "no error"
