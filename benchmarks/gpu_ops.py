"""The single ops of ``gpu.py``, each with its bytes, operations and plain spelling."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_bench import Bench, Op
from gpu_peers import torchrec_bags
from tablewright.kernels.cross import matrix as cross
from tablewright.kernels.embedding import gpu as embedding
from tablewright.kernels.embedding import gpu_small as embedding_small
from tablewright.kernels.embedding.spec import Extra, GroupSpec, Lookup, Table
from tablewright.kernels.embedding.updates import TableUpdate
from tablewright.kernels.interaction import gpu as interaction
from tablewright.kernels.lookup_dots import gpu as lookup_dots
from tablewright.kernels.mlp import gpu as mlp
from tablewright.kernels.mlp.layers import FORMS, Layer
from torch import Tensor
from torch.nn import functional as F

MULTI_HOT = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)  # ids a sample, MLPerf v3
MLPERF_ROWS = (
    40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155, 4, 976, 14, 40000000,
    40000000, 40000000, 590152, 12973, 108, 36,
)  # fmt: skip


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- table-batched bags ----------------------------------------------------------------------------------------------------------


class Bags:
    """Tables and ids of one setting: ``pooling[t]`` ids for each of ``batch`` bags of table t, uniform or Zipf-like."""

    def __init__(self, bench: Bench, rows: list[int], dim: int, pooling: list[int], batch: int, dtype: torch.dtype, skew: float = 0.0):
        device = bench.device
        self.dim, self.batch, self.dtype, self.pooling = dim, batch, dtype, pooling
        self.tables = [torch.empty(r, dim, dtype=dtype, device=device).uniform_(-0.05, 0.05) for r in rows]
        self.ids, self.offsets = [], []
        for r, length in zip(rows, pooling):
            uniform = torch.rand(batch * length, device=device, dtype=torch.float64)
            rank = uniform * r if not skew else ((((r + 1.0) ** (1 - skew) - 1) * uniform + 1) ** (1 / (1 - skew)) - 1)
            ids = rank.long().clamp_(0, r - 1)
            self.ids.append((ids * 40503 % r if skew else ids).int())
            self.offsets.append(torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device))
        self.spec = GroupSpec(
            tuple(Table(f"t{i}", r, dim) for i, r in enumerate(rows)),
            tuple(Lookup(i, f"bag{i}", "sum", 0, i * dim, include_last_offset=True) for i in range(len(rows))),
            (dim * len(rows),),
        )
        self.nothing = [None] * len(rows)
        self.reads = sum(i.numel() for i in self.ids)

    def forward(self) -> Tensor:
        return embedding.forward(self.spec, self.tables, self.ids, self.offsets, self.nothing, [])[0]

    @property
    def forward_bytes(self) -> float:
        size = self.dtype.itemsize
        offsets = sum(o.numel() for o in self.offsets) * 4
        return self.reads * (4 + self.dim * size) + offsets + self.batch * len(self.tables) * self.dim * size

    def plain(self, tables: list[Tensor], sparse: bool = False) -> Tensor:
        bags = zip(tables, self.ids, self.offsets)
        return torch.cat([F.embedding_bag(i, t, o, mode="sum", include_last_offset=True, sparse=sparse) for t, i, o in bags], 1)


def _backward(bench: Bench, bags: Bags, name: str, shape: str) -> Op:
    states = [torch.zeros(len(t), device=bench.device) for t in bags.tables]
    updates = [TableUpdate("rowwise_adagrad", 0.01, 1e-8, state=(s,)) for s in states]
    grad = torch.randn(bags.batch, bags.spec.slots[0], device=bench.device).mul_(1e-3).to(bags.dtype)
    size = bags.dtype.itemsize
    distinct = sum(int(torch.unique(i).numel()) for i in bags.ids)
    # ids; a sort of 4-byte keys and values in 8-bit digits; each read's gradient row; each touched row and its state, read and written
    bits = max(r.bit_length() for r in (len(t) for t in bags.tables))
    moved = bags.reads * 4 + bags.reads * 16 * -(-bits // 8) + bags.reads * bags.dim * size + distinct * 2 * (bags.dim * size + 4)
    leaves = [t.detach().requires_grad_() for t in bags.tables]
    held: list = []

    def eager() -> None:
        if not held:
            held.extend((bags.plain(leaves, sparse=True), torch.optim.Adagrad(leaves, lr=0.01)))
        for leaf, made in zip(leaves, torch.autograd.grad(held[0], leaves, grad, retain_graph=True)):
            leaf.grad = made
        held[1].step()

    run = lambda: embedding.update(bags.spec, [grad], bags.tables, bags.ids, bags.offsets, bags.nothing, updates)  # noqa: E731
    return Op(name, shape, run, moved, eager=eager if bags.dtype == torch.float32 else None, compiled=False)


def bags(bench: Bench) -> Iterator[Op]:
    """Forward, and backward with rowwise AdaGrad, of 26 tables."""
    count, rows, dim, batch = (2, 600, 16, 4) if bench.tiny else (26, 1_000_000, 128, 65536)
    mixed = [n if not bench.tiny else 2 for n in MULTI_HOT][:count]
    settings = [
        ("pooling 1", [1] * count, torch.float16, 0.0), ("pooling 1", [1] * count, torch.float32, 0.0),
        ("pooling 10", [10] * count, torch.float16, 0.0), ("pooling 10", [10] * count, torch.float32, 0.0),
        ("pooling 10, Zipf 1.05", [10] * count, torch.float16, 1.05), ("multi-hot", mixed, torch.float16, 0.0),
    ]  # fmt: skip
    for what, pooling, dtype, skew in settings[:2] if bench.tiny else settings:
        made = Bags(bench, [rows] * count, dim, pooling, batch, dtype, skew)
        shape = f"{count} x {rows:,} x {dim} {_text(dtype)}, batch {batch}, {what}"
        peer = torchrec_bags(bench, made)
        forward_others = {"TorchRec Triton": peer[0]} if peer else {}
        yield Op("bags forward", shape, made.forward, made.forward_bytes, eager=lambda m=made: m.plain(m.tables), others=forward_others)
        op = _backward(bench, made, "bags backward + rowwise AdaGrad", shape)
        op.others = {"TorchRec Triton": peer[1]} if peer else {}
        yield op
        if dtype == torch.float16 and pooling[0] != 1 or bench.tiny:
            yield _both(made, op, shape)
    rows = 7 if bench.tiny else embedding_small.ROWS
    shape = f"{min(count, 8)} x {rows} x {dim}, batch {batch}, pooling 1"
    for dtype in (torch.float16, torch.float32):
        made = Bags(bench, [rows] * min(count, 8), dim, [1] * min(count, 8), batch, dtype)
        op = _backward(bench, made, "small tables' backward + rowwise AdaGrad", f"{shape}, {_text(dtype)}")
        op.bytes = made.reads * (4 + made.dim * made.dtype.itemsize)  # no sort; partial sums are no part of what must move
        op.flops = 2 * made.reads * rows * dim
        op.others = {"sorted": _with(embedding_small, "ROWS", 0, op.run)}
        yield op


def _with(module, name: str, value, run):
    """``run`` while ``module.name`` is ``value``."""

    def call() -> None:
        kept = getattr(module, name)
        setattr(module, name, value)
        try:
            run()
        finally:
            setattr(module, name, kept)

    return call


def _both(made: Bags, backward: Op, shape: str) -> Op:
    """Forward and backward, whose sort runs beside the forward; beside it the same without."""

    def run() -> None:
        ahead = embedding.ahead_of_backward(made.spec, made.tables, made.ids, made.offsets, ["in_backward"] * len(made.tables))
        made.forward()
        backward.run()
        del ahead

    others = {"sort in the backward": _with(embedding, "SORT_AHEAD", False, run)}
    return Op("forward + backward of bags", shape, run, made.forward_bytes + backward.bytes, others=others)


# --- interactions ----------------------------------------------------------------------------------------------------------------


def dots(bench: Bench) -> Iterator[Op]:
    """The dot interaction of DLRM, forward and backward; with the lookups inside."""
    batch, features, dim, rows = (2, 5, 16, 20) if bench.tiny else (65536, 27, 128, 1_000_000)
    pairs = f"{features} lower"
    count = features * (features - 1) // 2
    i, j = torch.tril_indices(features, features, -1, device=bench.device)
    for dtype in (torch.bfloat16, torch.float32)[: 1 if bench.tiny else 2]:
        x = torch.randn(batch, features, dim, device=bench.device).to(dtype)
        first, size = x[:, 0].contiguous(), dtype.itemsize
        grad = torch.randn(batch, count, device=bench.device).to(dtype)
        out = torch.empty(batch, -8 * (-(dim + count) // 8), device=bench.device, dtype=dtype)
        part, left = out[:, dim : dim + count], out[:, :dim]
        shape = f"{batch} x {features} x {dim} {_text(dtype)}"

        def plain(x=x, first=first) -> Tensor:
            return torch.cat([first, torch.bmm(x, x.transpose(1, 2))[:, i, j]], 1)

        leaf = x.clone().requires_grad_()
        held: list[Tensor] = []

        def plain_backward(leaf=leaf, grad=grad, held=held) -> object:
            if not held:
                held.append(torch.bmm(leaf, leaf.transpose(1, 2))[:, i, j])
            return torch.autograd.grad(held[0], leaf, grad, retain_graph=True)

        flops = 2 * batch * features**2 * dim
        moved = batch * (features * dim + 2 * dim + count) * size
        beside = [(first, left)]
        yield Op("dots forward", shape, lambda x=x, p=part, b=beside: interaction.dots(x, pairs, p, b), moved, flops, eager=plain)
        moved = batch * (2 * features * dim + count) * size
        run = lambda x=x, g=grad: interaction.dots_backward(g, x, pairs)  # noqa: E731
        yield Op("dots backward", shape, run, moved, flops, eager=plain_backward, compiled=False)
    tables = [torch.randn(rows, dim, device=bench.device).half() for _ in range(features - 1)]
    ids = [torch.randint(rows, (batch,), device=bench.device, dtype=torch.int32) for _ in tables]
    dense = torch.randn(batch, dim, device=bench.device).half()
    spec = GroupSpec(
        tuple(Table(f"t{n}", rows, dim) for n in range(features - 1)),
        tuple(Lookup(n, f"lookup{n}", "none", 0, dim * (n + 1)) for n in range(features - 1)),
        (features * dim,), (Extra(0, 0, dim),),
    )  # fmt: skip
    out = torch.empty(batch, -8 * (-(dim + count) // 8), device=bench.device, dtype=torch.float16)
    grad = torch.randn(batch, count, device=bench.device).half()
    part, beside = out[:, dim : dim + count], [(dense, out[:, :dim])]
    moved = batch * ((features - 1) * (dim * 2 + 4) + 2 * (2 * dim + count) + 2 * dim)
    apart = lambda: interaction.dots(embedding.forward(spec, tables, ids, [None] * len(ids), [None] * len(ids), [dense])[0].view(batch, features, dim), pairs, part, beside)  # noqa: E731, E501  # fmt: skip

    def eager() -> Tensor:
        x = torch.stack([dense, *(F.embedding(k, t) for k, t in zip(ids, tables))], 1)
        return torch.cat([dense, torch.bmm(x, x.transpose(1, 2))[:, i, j]], 1)

    shape = f"{batch} x {features} x {dim} float16, one-hot"
    run = lambda: lookup_dots.dots(spec, tables, ids, [dense], pairs, part, beside)  # noqa: E731
    yield Op("lookup + dots forward", shape, run, moved, eager=eager, others={"apart": apart})
    moved = batch * (features * dim * 2 * 2 + (features - 1) * 4 + 2 * count)
    yield Op("lookup + dots backward", shape, lambda: lookup_dots.dots_backward(grad, spec, tables, ids, [dense], pairs), moved)


def fm(bench: Bench) -> Iterator[Op]:
    """Factorization machine, forward and backward."""
    batch, features, dim = (2, 4, 16) if bench.tiny else (65536, 39, 64)
    x = torch.randn(batch, features, dim, device=bench.device).to(torch.bfloat16)
    grad = torch.randn(batch, dim, device=bench.device).to(torch.bfloat16)
    shape = f"{batch} x {features} x {dim} bfloat16"
    plain = lambda: (x.sum(1).square() - x.square().sum(1)) / 2  # noqa: E731
    yield Op("FM forward", shape, lambda: interaction.fm(x, 1.0, False), 2 * batch * dim * (features + 1), eager=plain)
    back = lambda: grad[:, None] * (x.sum(1, keepdim=True) - x)  # noqa: E731
    yield Op("FM backward", shape, lambda: interaction.fm_backward(grad, x, 1.0, False), 2 * batch * dim * (2 * features + 1), eager=back)


def crosses(bench: Bench) -> Iterator[Op]:
    """A matrix cross layer of DCN v2, forward and backward, as a bf16 plan has it: the product in bfloat16, the rest in float32."""
    batch, dim = (4, 16) if bench.tiny else (65536, 512)
    x0, x, grad = (torch.randn(batch, dim, device=bench.device) for _ in range(3))
    weight = (torch.randn(dim, dim, device=bench.device) / dim**0.5).to(torch.bfloat16)
    shift = torch.zeros(dim, device=bench.device)
    _, y = cross._forward(x0, x, weight, None, shift)
    shape, flops = f"{batch} x {dim} float32, weight bfloat16", 2 * batch * dim * dim
    plain = lambda: x0 * F.linear(x.to(weight.dtype), weight) + shift + x  # noqa: E731
    yield Op("cross forward", shape, lambda: cross._forward(x0, x, weight, None, shift), 14 * batch * dim, flops, eager=plain)
    wanted = [True, True, True, False, True]
    yield Op("cross backward", shape, lambda: cross._backward(grad, x0, x, y, weight, wanted), 22 * batch * dim, 2 * flops)


# --- multilayer perceptrons ------------------------------------------------------------------------------------------------------


def mlps(bench: Bench) -> Iterator[Op]:
    """MLPerf's top perceptron in every form, forward and backward, without and with dropout; the floor is the bare products."""
    batch, sizes = (4, [40, 64, 32, 1]) if bench.tiny else (65536, [480, 1024, 1024, 512, 256, 1])
    weights = [(torch.randn(o, i, device=bench.device) / i**0.5).to(torch.bfloat16) for i, o in zip(sizes, sizes[1:])]
    biases = [torch.zeros(o, device=bench.device, dtype=torch.bfloat16) for o in sizes[1:]]
    x = torch.randn(batch, sizes[0], device=bench.device).to(torch.bfloat16)
    grad = torch.randn(batch, sizes[-1], device=bench.device).to(torch.bfloat16)
    middle = [torch.randn(batch, o, device=bench.device).to(torch.bfloat16) for o in sizes[:-1]]
    seed = torch.tensor([7], device=bench.device)
    flops = 2 * batch * sum(i * o for i, o in zip(sizes, sizes[1:]))
    wanted = [(True, True)] * len(weights)
    shape = f"{batch} x {'-'.join(map(str, sizes))} bfloat16"

    def products() -> None:
        for y, w in zip(middle, weights):
            y @ w.t()

    def products_back() -> None:
        above = [*middle[1:], grad]
        for y, g, w in zip(middle, above, weights):
            g @ w
            g.t() @ y

    for p in (0.0, 0.2):
        leaves = [t.detach().requires_grad_() for t in (x, *weights, *biases)]

        def plain(leaves=leaves, p=p) -> Tensor:
            y, count = leaves[0], len(weights)
            for k, (w, b) in enumerate(zip(leaves[1 : 1 + count], leaves[1 + count :])):
                y = F.linear(y, w, b)
                y = F.dropout(y.relu(), p) if k + 1 < count else y
            return y

        for form in FORMS:
            layers = tuple(Layer(k + 1 < len(weights), p if k + 1 < len(weights) else 0.0, form) for k in range(len(weights)))
            train = [True] * len(layers)
            given = x, weights, biases, layers, train, seed if p else None
            what = f"{shape}, dropout {p}, form {form}"
            last = form == FORMS[-1]
            eager = (lambda f=plain: f()) if last else None
            yield Op("MLP forward", what, lambda g=given: mlp.forward(*g), flops=flops, floor=products, eager=eager)
            outs, masks = mlp.forward(*given)
            back = lambda a=(outs[:-1], masks, layers, train): mlp.backward(grad, x, weights, *a, True, wanted)  # noqa: E731
            held: list[Tensor] = []

            def plain_back(leaves=leaves, f=plain, held=held) -> object:
                if not held:
                    held.append(f())
                return torch.autograd.grad(held[0], leaves, grad, retain_graph=True)

            eager = plain_back if last else None
            yield Op("MLP backward", what, back, flops=2 * flops, floor=products_back, eager=eager, compiled=False)


# --- codecs ----------------------------------------------------------------------------------------------------------------------


def codecs(bench: Bench) -> Iterator[Op]:
    """Rows to bytes and back."""
    from tablewright.kernels.codecs import op

    rows, dim = (8, 16) if bench.tiny else (65536 * 26, 128)
    x = torch.randn(rows, dim, device=bench.device)
    for codec in ("int8", "fp16", "bf16"):
        width = op.row_bytes(codec, dim)
        payload = op.encode(x, codec)
        shape = f"{rows} x {dim} float32, {codec}"
        moved = rows * (4 * dim + width)
        encode, decode = (lambda c=codec: op.encode(x, c)), (lambda c=codec, b=payload: op.decode(b, c, dim, torch.float32))
        plain_encode, plain_decode = (lambda c=codec: op.reference_encode(x, c)), (lambda c=codec, b=payload: op.reference_decode(b, c, dim, torch.float32))  # noqa: E501  # fmt: skip
        yield Op("encode rows", shape, encode, moved, eager=plain_encode)
        yield Op("decode rows", shape, decode, moved, eager=plain_decode)
