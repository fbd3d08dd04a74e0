"""Gradients and updates of bags of many ids, which go table by table (native/by_table.h): the same bits, and nothing written on bad input."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.embedding import cpu, reference
from tablewright.kernels.embedding.spec import GroupSpec, Lookup, Table
from test_embedding_cpu import Group, level, native_only, one_thread  # noqa: F401

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.describe())


class LongBags(Group):
    """Mostly bags of many ids, which are updated table by table (native/by_table.h): fixed, ragged, tied, weighted, padded, wrapped."""

    def __init__(self, dtype=torch.float32, rows=60, bags=120, tables=7):
        g = torch.Generator().manual_seed(2)
        lengths = torch.randint(0, 20, (bags,), generator=g)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        specs, self.indices, self.offsets, self.weights = [], [], [], []
        for t in range(tables):
            for kind in ("fixed", "ragged", "mean", "padded", "single") + ("weighted", "wrapped") * (t == 1):
                fixed = kind not in ("ragged", "mean")
                shape = (bags,) if kind in ("single", "wrapped") else (bags, 12) if fixed else (int(offsets[-1]),)
                pooling = {"single": "none", "wrapped": "none", "mean": "mean"}.get(kind, "sum")
                column = sum(16 if s.table % 2 else 64 for s in specs)
                options = {"padding_idx": 4 if kind == "padded" else None, "wrap_negative": kind == "wrapped"}
                specs.append(Lookup(t, f"{kind} {t}", pooling, 0, column, include_last_offset=not fixed, **options))
                self.indices.append(torch.randint(-rows if kind == "wrapped" else 0, rows, shape, generator=g).to((torch.int64, torch.int32)[t % 2]))
                self.offsets.append(None if fixed else offsets)
                self.weights.append(torch.randn(shape, generator=g).to(dtype) if kind == "weighted" else None)
        dims = [16 if t % 2 else 64 for t in range(tables)]
        width = column + dims[-1]
        self.spec = GroupSpec(tuple(Table(f"t{t}", rows, d) for t, d in enumerate(dims)), tuple(specs), (width,))
        self.tables = [torch.randn(rows, d, generator=g).to(dtype) for d in dims]
        self.grads = [torch.randn(bags, width, generator=g).to(dtype)]
        self.extras, self.dtype = [], dtype


@pytest.mark.usefixtures("level", "native_only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_long_bags_have_the_bits_of_sums_made_first(threads, dtype):
    torch.set_num_threads(threads)
    group = LongBags(dtype)
    rules, others = group.rules("rowwise_adagrad"), group.rules("rowwise_adagrad")
    rules[2] = others[2] = None  # a table that nobody updates
    wanted = [r is not None for r in rules]
    pairs = cpu.sparse_gradients(group.spec, group.grads, *group.inputs, wanted)
    mine, theirs = ([t.clone() for t in group.tables] for _ in range(2))
    cpu.update(group.spec, group.grads, mine, *group.inputs[1:], rules)
    cpu.update_from_sparse(theirs, [p and p[0] for p in pairs], [p and p[1] for p in pairs], others)
    for a, b in zip([*mine, *(r.state[0] for r in rules if r)], [*theirs, *(r.state[0] for r in others if r)]):
        assert torch.equal(a, b) if dtype == torch.float32 else torch.allclose(a.float(), b.float(), rtol=0.02, atol=0.02)
    assert torch.equal(mine[2], group.tables[2]) and not torch.equal(mine[0], group.tables[0])


@pytest.mark.usefixtures("native_only")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("last", ["id", "offset"])
def test_a_bad_input_of_the_last_table_leaves_long_bags_alone(last, threads):
    torch.set_num_threads(threads)
    group = LongBags()
    place = max(i for i, lookup in enumerate(group.spec.lookups) if lookup.name == "ragged 6")
    group.offsets[place] = group.offsets[place].clone()
    if last == "id":
        group.indices[place][-1] = 60
    else:
        group.offsets[place][-2] = 10_000
    rules, tables = group.rules("adagrad"), [t.clone() for t in group.tables]
    states = [r.state[0].clone() for r in rules]
    with pytest.raises(IndexError if last == "id" else ValueError, match="ragged 6"):
        cpu.update(group.spec, group.grads, tables, *group.inputs[1:], rules)
    for now, before in zip([*tables, *(r.state[0] for r in rules)], [*group.tables, *states]):
        assert torch.equal(now, before)


@pytest.mark.usefixtures("level", "native_only")
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_long_bags_are_those_of_the_reference(threads):
    torch.set_num_threads(threads)
    group = LongBags(torch.float64)
    wanted = [t != 2 for t in range(len(group.tables))]
    args = (group.spec, group.grads, *group.inputs, wanted)
    kept = [g.clone() for g in group.grads]
    for mine, theirs in zip(cpu.sparse_gradients(*args), reference.sparse_gradients(*args)):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert torch.equal(mine[0], theirs[0]) and torch.allclose(mine[1], theirs[1], rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(cpu.dense_gradients(*args), reference.dense_gradients(*args)):
        assert mine is None or torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(kept[0], group.grads[0])
