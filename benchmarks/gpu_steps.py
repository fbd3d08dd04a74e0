"""Whole training steps of ``gpu.py``: DLRM of MLPerf v1 (one id a table) and DLRM-DCNv2 of MLPerf v3 (bags), batch 65,536.

Ours is ``tw.optimize`` of the plain model with rowwise AdaGrad in the backward and ``precision: bf16``, its step recorded in a CUDA graph; inputs
come from pinned memory on a second stream, one batch ahead. Plain: the same model with ``sparse=True``, ``torch.autocast`` and plain SGD,
which is less work than AdaGrad, eager and under ``torch.compile``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import tablewright as tw
import torch
from gpu_bench import Bench, ms
from gpu_ops import MLPERF_ROWS, MULTI_HOT
from tablewright.kernels.embedding import gpu as embedding
from torch import Tensor, nn

_DENSE = 13


def mlp(*sizes: int, last: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*(layers if last else layers[:-1]))


class Dlrm(nn.Module):
    """MLPerf v1: 13-512-256-dim, dot interaction, 1024-1024-512-256-1."""

    def __init__(self, rows: list[int], dim: int, dtype: torch.dtype, device: torch.device, hidden: int = 1024) -> None:
        super().__init__()
        features = len(rows) + 1
        self.tables = nn.ModuleList(_table(nn.Embedding, n, dim, dtype, device) for n in rows)
        self.bottom = mlp(_DENSE, hidden // 2, hidden // 4, dim, last=True)
        self.top = mlp(dim + features * (features - 1) // 2, hidden, hidden, hidden // 2, hidden // 4, 1, last=False)
        i, j = torch.tril_indices(features, features, -1)
        self.register_buffer("i", i, persistent=False)
        self.register_buffer("j", j, persistent=False)

    def forward(self, dense: Tensor, *ids: Tensor) -> Tensor:
        x = self.bottom(dense)
        z = torch.stack([x, *(table(i) for table, i in zip(self.tables, ids))], 1)
        return self.top(torch.cat([x, torch.bmm(z, z.transpose(1, 2))[:, self.i, self.j]], 1)).squeeze(1)


class Dcn(nn.Module):
    """MLPerf v3: 13-512-256-dim, three low-rank cross layers of rank 512, 1024-1024-512-256-1; bags of several ids."""

    def __init__(self, rows: list[int], dim: int, dtype: torch.dtype, device: torch.device, hidden: int = 1024) -> None:
        super().__init__()
        width = (len(rows) + 1) * dim
        self.tables = nn.ModuleList(_table(nn.EmbeddingBag, n, dim, dtype, device, mode="sum") for n in rows)
        self.bottom = mlp(_DENSE, hidden // 2, hidden // 4, dim, last=True)
        self.v = nn.ModuleList(nn.Linear(width, hidden // 2, bias=False) for _ in range(3))
        self.u = nn.ModuleList(nn.Linear(hidden // 2, width) for _ in range(3))
        self.top = mlp(width, hidden, hidden, hidden // 2, hidden // 4, 1, last=False)

    def forward(self, dense: Tensor, *ids: Tensor) -> Tensor:
        x0 = torch.cat([self.bottom(dense), *(table(i) for table, i in zip(self.tables, ids))], 1)
        x = x0
        for u, v in zip(self.u, self.v):
            x = x0 * u(v(x)) + x
        return self.top(x).squeeze(1)


def _table(kind, rows: int, dim: int, dtype: torch.dtype, device: torch.device, **options) -> nn.Module:
    weight = torch.empty(rows, dim, dtype=dtype, device=device).uniform_(-(rows**-0.5), rows**-0.5)
    return kind.from_pretrained(weight, freeze=False, sparse=True, **options)


class Feed:
    """Batches in pinned memory, copied beside the running step and then into the tensors that the step reads."""

    def __init__(self, bench: Bench, batch: int, rows: list[int], hot: list[int] | None, batches: int = 4) -> None:
        torch.manual_seed(1)
        self.pinned = not bench.tiny
        self.host = [self._draw(batch, rows, hot) for _ in range(batches)]
        self.now = [t.to(bench.device) for t in self.host[0]]
        self.staged = [torch.empty_like(t) for t in self.now]
        self.stream = None if bench.tiny else torch.cuda.Stream()
        self.count = 0
        self._stage()

    def _draw(self, batch: int, rows: list[int], hot: list[int] | None) -> list[Tensor]:
        ids = [torch.randint(n, (batch,) if hot is None else (batch, hot[t]), dtype=torch.int32) for t, n in enumerate(rows)]
        made = [torch.randn(batch, _DENSE), *ids, torch.randint(2, (batch,)).float()]
        return [t.pin_memory() for t in made] if self.pinned else made

    def _stage(self) -> None:
        source = self.host[self.count % len(self.host)]
        if self.stream is None:
            for staged, t in zip(self.staged, source):
                staged.copy_(t)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for staged, t in zip(self.staged, source):
                staged.copy_(t, non_blocking=True)

    def next(self) -> list[Tensor]:
        """The step's own input tensors, holding the next batch."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        for t, staged in zip(self.now, self.staged):
            t.copy_(staged)
        self.count += 1
        self._stage()
        return self.now


def _seconds(step: Callable[[], object], steps: int, tiny: bool) -> float:
    """Wall clock of one step, over many."""
    wait = (lambda: None) if tiny else torch.cuda.synchronize
    for _ in range(1 if tiny else 3):
        step()
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - started) / steps


def _training_step(model: nn.Module, optimizers: list, feed: Feed, low: torch.dtype | None) -> Callable[[], None]:
    """Forward, backward and update on the tensors of ``feed``; ``low``: under autocast of this dtype."""
    loss_of = nn.BCEWithLogitsLoss()

    def step() -> None:
        *inputs, labels = feed.now
        with torch.autocast(labels.device.type, low or torch.bfloat16, enabled=low is not None):
            logits = model(*inputs)
        loss = loss_of(logits.float(), labels)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def _recorded(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def steps(bench: Bench, name: str, until: float) -> None:
    """The rows of one model ("dlrm" or "dcn")."""
    hot = None if name == "dlrm" else list(MULTI_HOT)
    kind: type[Dlrm] | type[Dcn] = Dlrm if name == "dlrm" else Dcn
    batch, dim, hidden, count, rows = (4, 8, 16, 5, [20] * 3) if bench.tiny else (65536, 128, 1024, 30, list(MLPERF_ROWS))
    hot = hot if hot is None or not bench.tiny else [2, 1, 3]
    dtype = torch.float32
    model = _fitting(kind, rows, dim, hidden, dtype, bench)
    feed = Feed(bench, batch, [t.num_embeddings for t in model.tables], hot)
    floats = sum(t.weight.numel() for t in model.tables)
    shape = f"batch {batch}, {len(rows)} tables, {floats * dtype.itemsize / 2**30:.1f} GiB {str(dtype).removeprefix('torch.')}"
    title = {"dlrm": "DLRM, MLPerf v1, whole step", "dcn": "DLRM-DCNv2, MLPerf v3, whole step"}[name]
    found: dict[str, float | None] = {}

    def measure(what: str, make: Callable[[], Callable[[], None]]) -> None:
        if time.perf_counter() > until and not bench.tiny:
            bench.note(f"{title}, {what}: left out, the time is over")
            return
        try:
            run = make()

            def fed() -> None:
                feed.next()
                run()

            found[what] = _seconds(fed, 2 if bench.tiny else count, bench.tiny)
        except Exception as error:
            bench.note(f"{title}, {what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            if bench.tiny:
                raise

    optimized: list[Callable[[], None]] = []

    def ours() -> Callable[[], None]:
        plan = tw.Plan(precision="bf16", embedding_optimizer=tw.RowwiseAdagrad(lr=0.01, eps=1e-8, in_backward=True))
        started = time.perf_counter()
        opt = tw.optimize(model, plan, sample_inputs=tuple(feed.now[:-1]))
        bench.note(f"{title}: optimize() took {time.perf_counter() - started:.1f} s; {str(opt.report).splitlines()[0]}")
        for row in opt.report.records:
            if row.rule in ("fuse_mlp", "fuse_lookup_dots", "fuse_dot_interaction", "fuse_cross"):
                bench.note(f"{title}: {row.rule} {row.status}: {row.reason or row.detail}")
        optimized.append(_training_step(opt, [torch.optim.SGD(opt.dense_parameters(), lr=0.01)], feed, None))
        return optimized[0]

    def plain(compiled: bool) -> Callable[[], None]:
        optimizers = [
            torch.optim.SGD(model.tables.parameters(), lr=0.01),
            torch.optim.SGD([p for n, p in model.named_parameters() if not n.startswith("tables.")], lr=0.01),
        ]
        return _training_step(torch.compile(model) if compiled else model, optimizers, feed, torch.bfloat16)  # type: ignore[arg-type]

    measure("ours", ours)
    if optimized and not bench.tiny:
        measure("ours, CUDA graph", lambda: _recorded(optimized[0]))
        embedding.SORT_AHEAD = False
        measure("ours, CUDA graph, sort in the backward", lambda: _recorded(optimized[0]))
        embedding.SORT_AHEAD = True
    measure("eager", lambda: plain(False))
    if not bench.tiny:
        measure("compile", lambda: plain(True))
    best = min((t for n, t in found.items() if n.startswith("ours") and t), default=None)
    if best is None:
        return
    rest = "; ".join(f"{n} {ms(t)} = {batch / t / 1e6:.2f} M samples/s" for n, t in found.items() if t)
    bench.row([title, shape, ms(best), "", "", "", ms(found.get("eager")), ms(found.get("compile")), rest])


def _fitting(kind, rows: list[int], dim: int, hidden: int, dtype: torch.dtype, bench: Bench):
    """The model with tables as large as the memory allows: rows halved until three quarters of it are enough."""
    if not bench.tiny:
        free, _ = torch.cuda.mem_get_info()
        while sum(rows) * dim * dtype.itemsize > 0.75 * free:
            largest = max(rows)
            rows = [min(r, largest // 2) for r in rows]
            bench.note(f"tables of more than {largest // 2:,} rows were cut to that, to fit into memory")
    return kind(rows, dim, dtype, bench.device, hidden).to(bench.device)
