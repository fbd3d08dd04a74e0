"""The C++ kernels against the reference: every dtype, pooling, id width, instruction set and thread count."""

import itertools
import subprocess
import sys

import pytest
import torch
from tablewright.kernels.embedding import buffers, cpu, reference
from tablewright.kernels.embedding.spec import Extra, GroupSpec, Lookup, Table
from tablewright.kernels.embedding.updates import TableUpdate

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.describe())
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LEVELS = [0, 1, 2]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(params=LEVELS, ids=["baseline", "AVX2", "AVX-512"])
def level(request):
    """Forces one instruction set; skipped where this CPU lacks it."""
    if not cpu.available():
        pytest.skip("not built")
    best = cpu._lib.tw_level(-1)
    if cpu._lib.tw_level(request.param) != request.param:
        pytest.skip("not on this CPU")
    yield request.param
    cpu._lib.tw_level(best)


@pytest.fixture
def native_only(monkeypatch):
    """Fails where a call silently falls back to the reference."""

    def refuse(*_, **__):
        raise AssertionError("fell back to the reference")

    class NoReference:
        forward = sparse_gradients = dense_gradients = sample_weight_gradients = update = update_from_sparse = staticmethod(refuse)

    monkeypatch.setattr(cpu, "reference", NoReference)


@pytest.fixture(autouse=True)
def one_thread():
    """Unless a test says otherwise; small calls use one thread in any case."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Group:
    """A spec with random tensors: every pooling, two tied lookups, padding, weights, ragged and fixed bags, an extra."""

    def __init__(
        self, dtype=torch.float32, dims=(16, 33), rows=50, batch=37, id_dtype=torch.int64, offset_dtype=torch.int64, seed=0
    ):
        g = torch.Generator().manual_seed(seed)
        tables, lookups, self.indices, self.offsets, self.weights = [], [], [], [], []
        column = 3
        for t, dim in enumerate(dims):
            tables.append(Table(f"t{t}.weight", rows, dim))
            for kind in ("single", "fixed sum", "fixed mean", "ragged sum", "ragged mean", "weighted", "fixed weighted", "wrapped"):
                pooling = "none" if kind in ("single", "wrapped") else "mean" if "mean" in kind else "sum"
                offsets = weights = None
                if pooling == "none":
                    ids = torch.randint(-rows if kind == "wrapped" else 0, rows, (batch,), generator=g)
                elif "fixed" in kind:
                    ids = torch.randint(rows, (batch, 3), generator=g)
                else:
                    lengths = torch.randint(0, 7, (batch,), generator=g)
                    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
                    ids = torch.randint(rows, (int(offsets[-1]),), generator=g)
                    if ids.numel():
                        ids[-1] = rows - 1
                    offsets = (offsets if kind == "ragged mean" else offsets[:-1]).to(offset_dtype)
                if "weighted" in kind:
                    weights = torch.randn(ids.shape, generator=g).to(dtype)
                padding = 7 if kind in ("single", "fixed mean", "ragged mean", "weighted") else None
                lookups.append(Lookup(t, f"{kind} {t}", pooling, 0, column, padding, kind == "ragged mean", kind == "wrapped"))
                column += dim
                self.indices.append(ids.to(id_dtype))
                self.offsets.append(offsets)
                self.weights.append(weights)
        self.spec = GroupSpec(tuple(tables), tuple(lookups), (column,), (Extra(0, 0, 3),))
        self.tables = [torch.randn(rows, d, generator=g).to(dtype) for d in dims]
        self.extras = [torch.randn(batch, 3, generator=g).to(dtype)]
        self.grads = [torch.randn(batch, column, generator=g).to(dtype)]
        self.dtype = dtype

    @property
    def inputs(self):
        return self.tables, self.indices, self.offsets, self.weights

    def rules(self, kind, state_dtype=None, **options):
        """One update per table with fresh random state."""
        rules = []
        for t in self.tables:
            dtype = state_dtype or (torch.float64 if self.dtype == torch.float64 else torch.float32)
            shapes = {"sgd": [], "adagrad": [t.shape], "rowwise_adagrad": [t.shape[:1]], "adam": [t.shape, t.shape]}[kind]
            g = torch.Generator().manual_seed(5)
            state = tuple(torch.rand(s, generator=g).to(dtype) for s in shapes)
            rules.append(TableUpdate(kind, 0.1, 1e-3, 0.9, 0.99, state=state, step=3, **options))
        return rules


def close(got, want, dtype):
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 4)


def check_everything(group):
    """Forward, both gradients and weight gradients against the reference."""
    dtype = group.dtype
    (got,), (want,) = (m.forward(group.spec, *group.inputs, group.extras) for m in (cpu, reference))
    close(got, want, dtype)
    both = [True] * len(group.tables)
    for (rows, values), (want_rows, want_values) in zip(
        *(m.sparse_gradients(group.spec, group.grads, *group.inputs, both) for m in (cpu, reference))
    ):
        assert torch.equal(rows, want_rows) and values.dtype == dtype
        close(values, want_values, dtype)
    for got, want in zip(*(m.dense_gradients(group.spec, group.grads, *group.inputs, both) for m in (cpu, reference))):
        close(got, want, dtype)
    weighted = [w is not None for w in group.weights]
    for got, want in zip(*(m.sample_weight_gradients(group.spec, group.grads, *group.inputs, weighted) for m in (cpu, reference))):
        assert (got is None) == (want is None)
        if got is not None:
            close(got, want, torch.float32 if dtype == torch.float32 else dtype)


def check_update(group, rules):
    """update() against the reference, on tables and state."""
    both = []
    for module in (cpu, reference):
        tables = [t.clone() for t in group.tables]
        copies = [None if r is None else TableUpdate(**{**vars(r), "state": tuple(s.clone() for s in r.state)}) for r in rules]
        module.update(group.spec, group.grads, tables, group.indices, group.offsets, group.weights, copies)
        both.append(tables + [s for c in copies if c for s in c.state])
    for got, want in zip(*both):
        close(got, want, group.dtype)
    assert any(not torch.equal(a, b) for a, b in zip(both[0], group.tables))


@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype, id_dtype, level):
    other = torch.int32 if id_dtype == torch.int64 else torch.int64
    group = Group(dtype, id_dtype=id_dtype, offset_dtype=other)
    check_everything(group)
    for kind in ("sgd", "adagrad", "rowwise_adagrad", "adam"):
        check_update(group, group.rules(kind))
        check_update(group, group.rules(kind, maximize=True, weight_decay=0.1))
    if dtype in (torch.float16, torch.bfloat16):
        check_update(group, group.rules("adagrad", state_dtype=dtype))


@pytest.mark.parametrize("dim", [1, 3, 4, 7, 8, 16, 33, 64, 100, 128, 257, 512])
def test_every_width(dim, level, native_only):
    for dtype in (torch.float32, torch.bfloat16):
        group = Group(dtype, dims=(dim,), batch=19, rows=11)
        check_everything(group)
        check_update(group, group.rules("rowwise_adagrad"))
        check_update(group, group.rules("adam"))


@pytest.mark.parametrize("batch", [0, 1, 2, 129])
def test_every_batch(batch, native_only):
    for id_dtype in (torch.int32, torch.int64):
        group = Group(batch=batch, id_dtype=id_dtype)
        check_everything(group)
        if batch:
            check_update(group, group.rules("adagrad"))


def test_large_tables_and_long_runs(native_only):
    """Rows enough for several sorting passes, and a hot id with thousands of duplicates; on two threads."""
    torch.set_num_threads(2)
    g = torch.Generator().manual_seed(3)
    rows, batch = 300_000, 3000
    spec = GroupSpec(
        (Table("a", rows, 8), Table("b", 70_001, 16)), (Lookup(0, "a", "sum", 0, 0), Lookup(1, "b", "none", 0, 8)), (24,)
    )
    hot = torch.randint(rows, (batch, 4), generator=g)
    hot[:, 1] = 123_456
    hot[0, 0] = rows - 1
    ids = [hot, torch.randint(70_001, (batch,), generator=g)]
    tables = [torch.randn(rows, 8, generator=g, dtype=torch.float64), torch.randn(70_001, 16, generator=g, dtype=torch.float64)]
    group = Group.__new__(Group)
    group.spec, group.tables, group.indices, group.offsets, group.weights = spec, tables, ids, [None] * 2, [None] * 2
    group.extras, group.grads, group.dtype = [], [torch.randn(batch, 24, generator=g, dtype=torch.float64)], torch.float64
    check_everything(group)
    check_update(group, group.rules("rowwise_adagrad"))


def test_outputs_too_large_for_a_cache(level, native_only):
    """From 4 MB of output on, whole rows are written past the caches: aligned ones and, with an odd column, others."""
    ids = [torch.randperm(20_000), torch.randint(500, (20_000,))]
    tables = [torch.randn(20_000, 64), torch.randn(500, 16)]
    for first in (0, 1):
        spec = GroupSpec(
            (Table("a", 20_000, 64), Table("b", 500, 16)),
            (Lookup(0, "a", "none", 0, first), Lookup(1, "b", "none", 0, first + 64)),
            (first + 80,),
            (Extra(0, 0, 1),) * first,
        )
        extras, none = [torch.randn(20_000, 1)] * first, [None] * 2
        want = torch.cat([*extras, tables[0][ids[0]], tables[1][ids[1]]], 1)
        (got,) = cpu.forward(spec, tables, ids, none, none, extras)
        assert torch.equal(got, want)
        pairs = cpu.sparse_gradients(spec, [want], tables, ids, none, none, [True, False])
        assert pairs[1] is None and torch.equal(pairs[0][0], torch.arange(20_000)) and torch.equal(pairs[0][1], tables[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(dtype, level):
    group = Group(dtype, batch=1500, rows=400)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        tables, rules = [t.clone() for t in group.tables], group.rules("adam")
        cpu.update(group.spec, group.grads, tables, group.indices, group.offsets, group.weights, rules)
        pairs = cpu.sparse_gradients(group.spec, group.grads, *group.inputs, [True, True])
        results.append(
            cpu.forward(group.spec, *group.inputs, group.extras)
            + tables
            + [s for r in rules for s in r.state]
            + [x for p in pairs for x in p]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_from_sparse(dtype, kind, level, native_only):
    group = Group(dtype)
    pairs = reference.sparse_gradients(group.spec, group.grads, *group.inputs, [True, True])
    both = []
    for module in (cpu, reference):
        tables, rules = [t.clone() for t in group.tables], group.rules(kind, weight_decay=0.1)
        module.update_from_sparse(tables, [p[0] for p in pairs], [p[1] for p in pairs], rules)
        both.append(tables + [s for r in rules for s in r.state])
    for got, want in zip(*both):
        close(got, want, dtype)
    assert not torch.equal(both[0][0], group.tables[0])


def test_update_equals_sparse_gradients_then_update_from_sparse(native_only):
    """In float32 the two ways round alike: same bits."""
    group = Group(torch.float32, batch=500)
    fused, split = [t.clone() for t in group.tables], [t.clone() for t in group.tables]
    cpu.update(group.spec, group.grads, fused, group.indices, group.offsets, group.weights, group.rules("adagrad"))
    pairs = cpu.sparse_gradients(group.spec, group.grads, *group.inputs, [True, True])
    cpu.update_from_sparse(split, [p[0] for p in pairs], [p[1] for p in pairs], group.rules("adagrad"))
    assert all(torch.equal(a, b) for a, b in zip(fused, split))


def test_layouts_that_are_not_contiguous(native_only):
    """Strided ids, offsets, weights, gradients and a table that is a column range of a wider one."""
    group = Group(torch.float32, dims=(16,))
    group.indices = [torch.stack([i, i], -1)[..., 0] for i in group.indices]
    group.offsets = [None if o is None else torch.stack([o, o], -1)[:, 0] for o in group.offsets]
    group.weights = [None if w is None else torch.stack([w, w], -1)[..., 0] for w in group.weights]
    wide = torch.randn(50, 40)
    wide[:, 8:24] = group.tables[0]
    before = wide.clone()
    plain = group.tables
    (want,) = reference.forward(group.spec, *group.inputs, group.extras)
    group.tables = [wide[:, 8:24]]
    (got,) = cpu.forward(group.spec, *group.inputs, group.extras)
    close(got, want, torch.float32)
    rules, want_rules = group.rules("sgd"), group.rules("sgd")
    for grad in (
        group.grads[0].t().contiguous().t(),
        torch.randn(()).expand(group.grads[0].shape),
        group.grads[0][:1].expand_as(group.grads[0]),
    ):
        cpu.update(group.spec, [grad], group.tables, group.indices, group.offsets, group.weights, rules)
        reference.update(group.spec, [grad], plain, group.indices, group.offsets, group.weights, want_rules)
    close(group.tables[0], plain[0], torch.float32)
    assert torch.equal(wide[:, :8], before[:, :8]) and torch.equal(wide[:, 24:], before[:, 24:])


def test_tables_and_slots_without_gradient():
    spec = GroupSpec(
        (Table("a", 9, 4), Table("b", 9, 4)),
        (Lookup(0, "a", "none", 0, 0), Lookup(1, "b", "none", 1, 0), Lookup(1, "b2", "none", 0, 4)),
        (8, 4),
    )
    tables, ids = [torch.randn(9, 4), torch.randn(9, 4)], [torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 4])]
    none = [None] * 3
    for wanted, grads in itertools.product(
        ([True, True], [False, True]), ([torch.ones(2, 8), None], [None, torch.ones(1, 4)], [None, None])
    ):
        got, want = (m.sparse_gradients(spec, grads, tables, ids, none, none, wanted) for m in (cpu, reference))
        for g, w in zip(got, want):
            assert (g is None) == (w is None)
            assert g is None or torch.equal(g[0], w[0]) and torch.equal(g[1], w[1])
    before = tables[0].clone()
    cpu.update(spec, [torch.ones(2, 8), None], tables, ids, none, none, [None, TableUpdate("sgd", 1.0)])
    assert torch.equal(tables[0], before)


SHAPES = {
    "past the end": (
        "none",
        [0, 1, 2, 9],
        None,
        IndexError,
        r"id 9 at position 3 of lookup 'user' is out of range for table 'user.weight' with 9 rows: "
        r"ids must be in \[0, 9\)",
    ),
    "negative": ("none", [0, -1], None, IndexError, "id -1 at position 1 of lookup 'user'"),
    "far out": ("sum", [[0, 1 << 40]], None, IndexError, "id 1099511627776 at position 1"),
    "in a bag": ("mean", [0, 1, 10, 2], [0, 2], IndexError, "id 10 at position 2"),
    "decreasing": ("sum", [0, 1, 2], [0, 2, 1], ValueError, "offsets of lookup 'user' must not decrease: offset 2 is 1, after 2"),
    "late start": ("sum", [0, 1, 2], [1, 2], ValueError, "offsets of lookup 'user' must start at 0; offset 0 is 1"),
    "beyond": ("sum", [0, 1, 2], [0, 4], ValueError, "offset 1 is 4, but there are 3 ids"),
    "floats": ("none", [0.0, 1.0], None, TypeError, "lookup 'user' got ids of dtype torch.float32"),
    "no offsets": ("sum", [0, 1], None, ValueError, r"pooling sum needs ids \[B, L\] or offsets"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_errors_name_the_culprit_and_nothing_is_written(name):
    pooling, ids, offsets, error, message = SHAPES[name]
    spec = GroupSpec(
        (Table("item.weight", 9, 4), Table("user.weight", 9, 4)),
        (Lookup(0, "item", "none", 0, 0), Lookup(1, "user", pooling, 1, 0), Lookup(1, "later", "none", 0, 4)),
        (8, 4),
    )
    tables = [torch.randn(9, 4), torch.randn(9, 4)]
    ids = torch.tensor(ids)
    indices = [torch.tensor([1, 2]), ids, torch.tensor([100, 2])]  # the last lookup is wrong as well; the first culprit is named
    offsets = [None, None if offsets is None else torch.tensor(offsets), None]
    bags = offsets[1].numel() if offsets[1] is not None else ids.shape[0]
    grads = [torch.randn(2, 8), torch.randn(bags, 4)]
    none = [None] * 3
    before = [t.clone() for t in tables]
    state = [torch.zeros(9), torch.zeros(9)]
    rules = [TableUpdate("rowwise_adagrad", 0.1, state=(s,)) for s in state]
    for module in (cpu, reference):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with pytest.raises(error, match=message):
                module.forward(spec, tables, indices, offsets, none, [])
            with pytest.raises(error, match=message):
                module.update(spec, grads, tables, indices, offsets, none, rules)
            with pytest.raises(error, match=message):
                module.sparse_gradients(spec, grads, tables, indices, offsets, none, [True, True])
    assert all(torch.equal(a, b) for a, b in zip(tables, before)) and not any(s.any() for s in state)


def test_a_bad_id_deep_in_a_large_batch(native_only):
    """Enough work for two threads: both may be busy when the bad id is met."""
    torch.set_num_threads(2)
    spec = GroupSpec(
        (Table("a", 99, 64), Table("b", 99, 64)), (Lookup(0, "a", "none", 0, 0), Lookup(1, "b", "none", 0, 64)), (128,)
    )
    tables, ids = [torch.randn(99, 64), torch.randn(99, 64)], [torch.randint(99, (5000,)), torch.randint(99, (5000,))]
    ids[1][4999] = 99
    before, none = [t.clone() for t in tables], [None] * 2
    for call in (
        lambda: cpu.forward(spec, tables, ids, none, none, []),
        lambda: cpu.update(spec, [torch.randn(5000, 128)], tables, ids, none, none, [TableUpdate("sgd", 0.1)] * 2),
        lambda: cpu.dense_gradients(spec, [torch.randn(5000, 128)], tables, ids, none, none, [True] * 2),
    ):
        with pytest.raises(IndexError, match="id 99 at position 4999 of lookup 'b'"):
            call()
    assert all(torch.equal(a, b) for a, b in zip(tables, before))


def test_lookups_of_one_slot_must_agree():
    spec = GroupSpec((Table("w", 9, 4),), (Lookup(0, "a", "none", 0, 0), Lookup(0, "b", "none", 0, 4)), (8,))
    for module in (cpu, reference):
        with pytest.raises(
            ValueError, match=r"lookups 'a' and 'b' write one tensor, but their leading shapes differ: \[2\] and \[3\]"
        ):
            module.forward(spec, [torch.randn(9, 4)], [torch.arange(2), torch.arange(3)], [None] * 2, [None] * 2, [])


def test_update_from_sparse_checks_rows():
    table = torch.zeros(5, 2)
    for rows, error in (([1, 7], IndexError), ([-1, 2], IndexError), ([2, 2], ValueError), ([3, 1], ValueError)):
        for module in (cpu, reference):
            with pytest.raises(error):
                module.update_from_sparse([table], [torch.tensor(rows)], [torch.ones(2, 2)], [TableUpdate("sgd", 1.0)])
    assert not table.any()


def test_half_precision_numbers_survive_the_round_trip(level):
    """Every float16 and bfloat16 number: forward must return it as it is; a sum of one id goes through float32 and back."""
    for dtype in (torch.float16, torch.bfloat16):
        table = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
        spec = GroupSpec(
            (Table("w", 1 << 16, 1),), (Lookup(0, "w", "sum", 0, 0, padding_idx=0), Lookup(0, "w", "none", 1, 0)), (1, 1)
        )
        ids = torch.arange(1, 1 << 16)
        summed, copied = cpu.forward(spec, [table], [ids[:, None], ids], [None, None], [None, None], [])
        want = table[1:]
        assert torch.equal(copied.view(torch.int16), want.view(torch.int16))
        torch.testing.assert_close(summed, want, rtol=0, atol=0, equal_nan=True)
        # Rounding: halves of neighbouring numbers, by torch's own conversion.
        values = torch.randn(4096, 8) * torch.logspace(-9, 5, 4096)[:, None]
        grads = cpu.update_from_sparse
        weight = torch.zeros(4096, 8, dtype=dtype)
        state = values.abs()
        grads([weight], [torch.arange(4096)], [torch.ones(4096, 8, dtype=dtype)], [TableUpdate("adagrad", -1.0, state=(state,))])
        torch.testing.assert_close(weight, (1 / (values.abs() + 1).sqrt()).to(dtype), rtol=TOLERANCE[dtype], atol=1e-7)


def test_large_buffers_are_used_again_but_never_while_in_use():
    shape = (1024, 777)
    first = buffers.empty(shape, torch.float32)
    second = buffers.empty(shape, torch.float32)
    where = first.data_ptr()
    assert first.shape == shape and first.is_contiguous() and second.data_ptr() != where
    view = first[5:]
    del first
    third = buffers.empty(shape, torch.float32)
    assert third.data_ptr() not in (where, second.data_ptr())
    numpy_view = view.numpy()
    del view
    assert buffers.empty(shape, torch.float32).data_ptr() != where
    del numpy_view
    assert buffers.empty(shape, torch.bfloat16).data_ptr() != where  # another size
    assert buffers.empty(shape, torch.float32).data_ptr() == where
    held = [buffers.empty((1 << 20,), torch.float32) for _ in range(3)]
    del held
    buffers._drop_idle(0)
    assert all(buffers._IDLE not in buffers._references(held) for held in buffers._maps.values())


def test_describe_and_fall_back_without_the_library():
    assert cpu.describe().startswith("native ")
    code = (
        "from tablewright.kernels.embedding import cpu\n"
        "from tablewright.kernels.embedding.spec import *\nimport torch\n"
        "cpu._lib, cpu._why_not = None, 'it was taken away'\n"
        "assert cpu.describe() == 'pure PyTorch: it was taken away' and not cpu.available()\n"
        "spec = GroupSpec((Table('w', 9, 4),), (Lookup(0, 'a', 'none', 0, 0),), (4,))\n"
        "w = torch.randn(9, 4)\n"
        "assert torch.equal(cpu.forward(spec, [w], [torch.tensor([2])], [None], [None], [])[0], w[2:3])\n"
        "pairs = cpu.sparse_gradients(spec, [torch.ones(1, 4)], [w], [torch.tensor([2])], [None], [None], [True])\n"
        "assert pairs[0][0].tolist() == [2]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
