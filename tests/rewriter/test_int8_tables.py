"""``tables: {glob: {dtype: int8}}``: frozen tables in int8 rows of their own, plain names and float32 rows outside."""
from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import tablewright as tw
import torch
from small_models import DIM, ROWS, Tied, tied_batch
from tablewright.kernels.codecs.op import decode, encode
from tablewright.kernels.embedding import cpu
from tablewright.rewriter.errors import PlanError
from torch import Tensor, nn

INT8 = {"dtype": "int8", "trainable": False}


class Model(nn.Module):
    """Single ids, a summed sequence, bags with offsets and a padding row, weighted bags, and a float table that is trained."""

    def __init__(self, mode: str = "mean") -> None:
        super().__init__()
        self.user, self.free = nn.Embedding(50, 16), nn.Embedding(30, 16)
        self.tags, self.seen = nn.EmbeddingBag(40, 16, mode=mode, padding_idx=3), nn.EmbeddingBag(40, 33, mode="sum")
        self.out = nn.Linear(4 * 16 + 33, 1)

    def forward(self, user: Tensor, tags: Tensor, offsets: Tensor, seen: Tensor, weights: Tensor, history: Tensor) -> Tensor:
        bags = [self.tags(tags, offsets), self.seen(seen, per_sample_weights=weights), self.user(history).sum(1)]
        return self.out(torch.cat([self.user(user), *bags, self.free(user % 30)], 1)).squeeze(1)


def batch(rows: int = 9, seed: int = 0) -> tuple[Tensor, ...]:
    """Duplicates, the largest and the padding id, and empty bags."""
    g = torch.Generator().manual_seed(seed)
    user, tags, seen = (torch.randint(0, n, (k,), generator=g) for n, k in ((50, rows), (40, 4 * rows), (40, 3 * rows)))
    user[:1], tags[::5], seen[:1] = 49, 3, 39
    offsets = torch.randint(0, 4 * rows + 1, (rows,), generator=g).sort().values
    offsets[:1] = 0
    return user, tags, offsets, seen.view(rows, 3), torch.randn(rows, 3, generator=g), torch.randint(0, 50, (rows, 5), generator=g)


def planned(globs=("user", "tags", "seen"), **more) -> tw.Plan:
    return tw.Plan(numerics="approximate", tables={glob: INT8 for glob in globs}, **more)


def rounded(model: Model) -> Model:
    """The plain model over the rows that int8 gives."""
    made = copy.deepcopy(model)
    for module in (made.user, made.tags, made.seen):
        dim = module.weight.shape[1]
        module.weight = nn.Parameter(decode(encode(module.weight.detach(), "int8"), "int8", dim), requires_grad=False)
    return made


@pytest.mark.parametrize("door", ["fx", "export"])
def test_storage_report_and_outputs(door, monkeypatch):
    plain = Model()
    if door == "export":
        monkeypatch.setattr("tablewright.rewriter.capture.aten_special.SPECIAL", {})
    opt = tw.optimize(plain, planned(), sample_inputs=batch())
    assert opt.report.door == door and opt.report.coverage["lookups"] == (5, 5) and opt.report.launches == 2
    assert opt.report.coverage["pooled"] == (1, 1)
    rows = {r.subject: r.detail for r in opt.report.records if r.kind == "stored tables"}
    assert list(rows) == ["user.weight", "tags.weight", "seen.weight"] and "1,200 bytes instead of 3,200" in rows["user.weight"]
    assert opt.report.copied_bytes == 50 * 24 + 40 * 24 + 40 * 41 and "3,800 bytes instead of 11,040" in str(opt.report)
    assert opt.user.int8.dtype == torch.uint8 and opt.user.int8.shape == (50, 24) and opt.free.weight is plain.free.weight
    wanted = rounded(plain)
    for train in (True, False):
        opt.train(train)
        for size in (9, 1, 0):
            torch.testing.assert_close(opt(*batch(size)), wanted(*batch(size)), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(opt(*batch(size)), plain(*batch(size)), rtol=0.1, atol=0.1)
    assert opt.check(*batch())


def test_the_error_of_every_row_is_within_the_bound():
    plain = Model()
    opt = tw.optimize(plain, planned(), sample_inputs=batch())
    for name in ("user", "tags", "seen"):
        weight = getattr(plain, name).weight.detach().double()
        error = (getattr(opt, name).weight.double() - weight).abs()
        bound = (weight.amax(1) - weight.amin(1)) / 510 + 2.0**-20 * weight.abs().amax(1)
        assert (error <= bound[:, None]).all() and error.max() > 0


@pytest.mark.parametrize("native", [True, False])
def test_the_rest_trains_as_over_the_same_rows(native, monkeypatch):
    """Dense layers, the float table and per-sample weights get the gradients of a model over the decoded rows."""
    if not native:
        monkeypatch.setattr(cpu, "_lib", None)
        monkeypatch.setattr(cpu, "_direct", None)
    plain = Model()
    wanted = rounded(plain)
    optimizers = torch.optim.Adagrad(plain.parameters(), lr=0.1), torch.optim.Adagrad([p for p in wanted.parameters() if p.requires_grad], lr=0.1)
    opt, mine = tw.optimize(plain, planned(), optimizer=optimizers[0], sample_inputs=batch())
    before = opt.state_dict()["user.weight"].clone()
    for step in range(3):
        weight_grads = []
        for model, optimizer in ((opt, mine), (wanted, optimizers[1])):
            given = [t.requires_grad_() if t.is_floating_point() else t for t in batch(seed=step)]
            model(*given).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            weight_grads.append(given[4].grad)
        torch.testing.assert_close(*weight_grads, rtol=1e-4, atol=1e-5)
    for name in ("out.weight", "free.weight"):
        torch.testing.assert_close(opt.get_parameter(name), wanted.get_parameter(name), rtol=1e-4, atol=1e-5)
    assert torch.equal(opt.state_dict()["user.weight"], before) and plain.user.weight.grad is None


def test_state_dict_both_ways():
    plain = Model()
    rows = torch.randn(20000, 16, generator=torch.Generator().manual_seed(2))
    once = encode(rows, "int8")
    again = encode(decode(once, "int8", 16), "int8")
    plain.user.weight.data[0] = rows[(once != again).any(1)][0]  # one of the few rows that give other codes when they are encoded again
    opt = tw.optimize(plain, planned(), sample_inputs=batch())
    state = opt.state_dict()
    assert {n: (v.shape, v.dtype) for n, v in state.items()} == {n: (v.shape, v.dtype) for n, v in plain.state_dict().items()}
    assert torch.equal(state["user.weight"], rounded(plain).user.weight)
    Model().load_state_dict(state, strict=True)
    other, codes = Model(), opt.user.int8.clone()
    opt.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(opt(*batch()), rounded(other)(*batch()), rtol=1e-5, atol=1e-5)
    assert not torch.equal(opt.user.int8, codes)
    opt.load_state_dict(state, strict=True)
    assert not torch.equal(encode(state["user.weight"], "int8"), codes)
    assert torch.equal(opt.user.int8, codes), "what was saved comes back bit for bit"
    with pytest.raises(RuntimeError, match="size mismatch for weight|user.weight"):
        opt.load_state_dict({**state, "user.weight": torch.zeros(50, 17)})


def test_copies_and_the_way_back():
    plain = Model()
    opt = tw.optimize(plain, planned(), sample_inputs=batch())
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    for twin in (copy.deepcopy(opt), torch.load(file, weights_only=False)):
        assert torch.equal(twin.user.int8, opt.user.int8) and torch.equal(twin(*batch()), opt(*batch()))
    back = opt.unoptimized()
    assert type(back.user) is nn.Embedding and type(back.tags) is nn.EmbeddingBag and back.user.weight.dtype == torch.float32
    torch.testing.assert_close(back(*batch()), opt(*batch()), rtol=1e-5, atol=1e-5)


def test_tied_tables_are_stored_once():
    model = Tied()
    opt = tw.optimize(model, planned(["document"]), sample_inputs=tied_batch())
    assert opt.query.int8 is opt.document.int8 and opt.query.int8.shape == (ROWS, DIM + 8)
    torch.testing.assert_close(opt(*tied_batch()), model(*tied_batch()), rtol=5e-2, atol=5e-2)
    back = opt.unoptimized()
    assert back.query.weight is back.document.weight


def test_compiled_and_with_low_precision():
    results = []
    model = Model()
    for compiled in (False, True):
        opt = tw.optimize(model, planned(precision="bf16"), sample_inputs=batch())
        run = torch.compile(opt, backend="aot_eager", fullgraph=True) if compiled else opt
        results.append(run(*batch()))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_served_as_int8_rows(tmp_path):
    model = Model().eval()
    opt = tw.optimize(model, planned(), sample_inputs=batch()).eval()
    tw.export_serving(opt, batch(), tmp_path / "out", row_dtype="int8_rowwise")
    served = tw.load_serving(tmp_path / "out")
    given = dict(zip(("user", "tags", "offsets", "seen", "weights", "history"), (t.numpy() for t in batch(seed=4))))
    answer = served(**given)
    np.testing.assert_allclose(answer, opt(*batch(seed=4)).detach().numpy(), rtol=0.05, atol=0.05)
    assert tw.check_parity(opt, tmp_path / "out").ok
    served.close()


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.raw, self.thin = nn.Parameter(torch.randn(5, 3)), nn.Embedding(5, 2)

    def forward(self, ids):
        return self.raw[ids].sum(1) + self.thin(ids).sum(1)


def test_what_cannot_be_stored_is_named():
    ids = torch.tensor([1, 2])

    def refused(words: str, model=None, sample=None, numerics="approximate", **tables):
        with pytest.raises(PlanError, match=words):
            tw.optimize(model or Model(), tw.Plan(numerics=numerics, tables=tables), sample_inputs=sample or batch())

    refused("stores table 'user.weight' as int8, and it is trained.*trainable: false", user={"dtype": "int8"})
    refused("stores table 'user.weight' as int8, and it is trained", user={"dtype": "int8", "embedding_optimizer": tw.SGD(lr=1.0, in_backward=True)})
    refused("tables.user.dtype: int8 .* approximate.*or leave dtype out", numerics="reassociated", user=INT8)
    refused("'tags.weight' cannot be stored in int8: its bags take the largest value", Model("max"), tags=INT8)
    refused("'raw' is to be stored in int8, and it is no weight", Odd(), (ids,), raw=INT8)
    refused("'wide.weight' cannot be stored in int8: it is torch.float64", Tied(), tied_batch(), wide=INT8)
    refused("has compress and dtype: int8", user={**INT8, "compress": {"hashing": {"rows": 5}}})
    broken = Model()
    broken.user.weight.data[3] = torch.nan
    refused("not finite", broken, user=INT8)
    broken.user.weight.data[3, :2] = torch.tensor([-3e38, 3e38])
    broken.user.weight.data[3, 2:] = 0
    refused("'user.weight' cannot be stored in int8: a row's largest number less its smallest", broken, user=INT8)
    opt = tw.optimize(Model(), planned(), sample_inputs=batch())
    before = opt.user.int8.clone()
    with pytest.raises(RuntimeError, match="user.weight has a row whose largest number"):
        opt.load_state_dict(broken.state_dict())
    assert torch.equal(opt.user.int8, before)
    left = tw.optimize(Odd(), planned(["thin"]), sample_inputs=(ids,))
    (why,) = [r.reason for r in left.report.skipped() if r.kind == "stored tables"]
    assert "it has 40 bytes, and by int8 it would have 50" in why and left.thin.weight.dtype == torch.float32


def test_frozen_tables_need_no_more_words():
    model = Model()
    model.user.weight.requires_grad_(False)
    opt = tw.optimize(model, tw.Plan(numerics="approximate", tables={"user": {"dtype": "int8"}}), sample_inputs=batch())
    assert opt.user.int8.dtype == torch.uint8 and opt.report.coverage["stored tables"] == (1, 1)


def test_reads_that_int8_rows_do_not_serve_are_reported():
    class Largest(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 16)

        def forward(self, ids):
            return self.table(ids).max(1).values

    opt = tw.optimize(Largest(), planned(["table"]), sample_inputs=(torch.randint(0, 20, (4, 3)),))
    (left,) = [r.reason for r in opt.report.skipped() if r.kind == "pooled"]
    assert "its table has int8 rows, of which their maxima are read" in left
    assert opt.report.coverage["lookups"] == (1, 1) and opt.check(torch.randint(0, 20, (4, 3)))
