"""Bad input: a named error with the table's plain name and the first bad position; no weight changed; the model still usable."""
from __future__ import annotations

import pytest
import tablewright as tw
import torch
import torch.nn.functional as F
from small_models import assert_close, weights_of
from torch import nn

ROWS = 10


class Model(nn.Module):
    """A table by rows, one by bags with offsets, and one by indexing, which may be negative."""

    def __init__(self):
        super().__init__()
        self.user = nn.Embedding(ROWS, 4)
        self.tags = nn.EmbeddingBag(ROWS, 4, mode="sum")
        self.codes = nn.Parameter(torch.randn(ROWS, 4))

    def forward(self, user, tags, offsets, codes):
        return self.user(user) + self.tags(tags, offsets) + self.codes[codes]


def batch(**changes):
    good = {
        "user": torch.tensor([1, 2, 9]), "tags": torch.tensor([0, 5, 5, 9]), "offsets": torch.tensor([0, 2, 2]),
        "codes": torch.tensor([0, -1, -ROWS]),
    }  # fmt: skip
    return tuple({**good, **{k: torch.tensor(v) for k, v in changes.items()}}.values())


PLANS = {
    "default": "auto",
    "in_backward": tw.Plan(embedding_optimizer=tw.Adagrad(lr=0.1, in_backward=True)),
}

BAD = {
    "too large": ({"user": [1, ROWS, 99]}, IndexError, ["'user.weight'", "position 1", f"id {ROWS}", "[0, 10)"]),
    "negative": ({"user": [1, 2, -1]}, IndexError, ["'user.weight'", "position 2", "id -1"]),
    "too large in a bag": ({"tags": [0, 5, 5, 10]}, IndexError, ["'tags.weight'", "position 3", "id 10"]),
    "negative in a bag": ({"tags": [0, -7, 5, 9]}, IndexError, ["'tags.weight'", "position 1", "id -7"]),
    "too negative for indexing": ({"codes": [0, -1, -ROWS - 1]}, IndexError, ["'codes'", "position 2", "id -11", "[-10, 10)"]),
    "too large for indexing": ({"codes": [ROWS, 0, 0]}, IndexError, ["'codes'", "position 0", "id 10"]),
    "offsets decrease": ({"offsets": [0, 3, 2]}, ValueError, ["'tags.weight'", "offset 2 is 2, after 3"]),
    "offsets past the end": ({"offsets": [0, 2, 5]}, ValueError, ["'tags.weight'", "offset 2 is 5, but there are 4 ids"]),
    "offsets do not start at 0": ({"offsets": [1, 2, 3]}, ValueError, ["'tags.weight'", "start at 0; offset 0 is 1"]),
    "float ids": ({"user": [1.0, 2.0, 3.0]}, TypeError, ["'user.weight'", "torch.float32", "int32 or int64"]),
    "bool ids": ({"tags": [True, False, True, True]}, TypeError, ["'tags.weight'", "torch.bool", "int32 or int64"]),
}


def optimized(plan):
    torch.manual_seed(0)
    model = Model()
    if plan == "auto":
        return tw.optimize(model, plan, sample_inputs=batch(), optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1))
    return tw.optimize(model, plan, sample_inputs=batch()), None


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(("changes", "error", "words"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("grad", [True, False], ids=["training", "no_grad"])
def test_bad_ids(plan, changes, error, words, grad):
    opt, optim = optimized(plan)
    before = weights_of(opt)
    with torch.set_grad_enabled(grad), pytest.raises(error) as caught:
        opt(*batch(**changes))
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"
    assert_close(before, weights_of(opt))
    plain = opt.unoptimized()
    for _ in range(2):
        torch.testing.assert_close(opt(*batch()), plain(*batch()))
    opt(*batch()).square().sum().backward()
    if optim is not None:
        optim.step()
    assert not torch.equal(before["user.weight"], opt.user.weight)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_of_many_bad_ids_is_named(threads):
    opt, _ = optimized("auto")
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        many = torch.zeros(5000, dtype=torch.int64)
        many[[137, 138, 4000, 4999]] = 77
        with pytest.raises(IndexError, match="id 77 at position 137 of"):
            opt(torch.zeros(5000, dtype=torch.int64), many, torch.arange(5000), torch.zeros(5000, dtype=torch.int64))
    finally:
        torch.set_num_threads(kept)


def test_int32_and_int64_ids_are_both_fine():
    opt, _ = optimized("auto")
    small = tuple(t.int() for t in batch())
    torch.testing.assert_close(opt(*small), opt(*batch()))
    with pytest.raises(IndexError, match="'user.weight'"):
        opt(*(t.int() for t in batch(user=[0, 0, 2**31 - 1])))


def test_an_id_that_overflows_any_offset():
    opt, _ = optimized("auto")
    for huge in (2**62, -(2**62), 2**63 - 1, -(2**63)):
        with pytest.raises(IndexError, match="position 1"):
            opt(*batch(user=[0, huge, 0]))


def test_padding_ids_and_empty_batches_are_not_bad():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(ROWS, 4, padding_idx=ROWS - 1)

        def forward(self, ids):
            return self.e(ids)

    model = Padded()
    opt = tw.optimize(model, sample_inputs=(torch.tensor([1, 2]),))
    for ids in ([], [ROWS - 1], [ROWS - 1, 0, ROWS - 1]):
        ids = torch.tensor(ids, dtype=torch.int64)
        torch.testing.assert_close(opt(ids), model(ids))
    assert opt(torch.empty(0, dtype=torch.int64)).shape == (0, 4)


def test_a_sample_batch_with_a_bad_id_is_named_by_the_plain_model():
    with pytest.raises(tw.CaptureError, match="the plain model fails on the sample inputs"):
        tw.optimize(Model(), sample_inputs=batch(user=[0, 0, ROWS]))


def test_bad_plans_change_nothing():
    model = Model()
    before = weights_of(model)
    keys = {n: set(m.__dict__) for n, m in model.named_modules()}
    for plan, words in (
        ({"version": 1, "tabels": {}}, "did you mean 'tables'"),
        ({"version": 1, "tables": {"usr*": {"trainable": False}}}, "no table matches 'usr.'"),
        ("no such.yaml", None),
    ):
        with pytest.raises(FileNotFoundError if words is None else tw.PlanError, match=words):
            tw.optimize(model, plan, sample_inputs=batch())
    with pytest.raises(tw.PlanError, match="sample_inputs is a list"):
        tw.optimize(model, sample_inputs=[1, 2])
    with pytest.raises(tw.PlanError, match="takes an nn.Module, not function"):
        tw.optimize(lambda x: x)
    opt = tw.optimize(model, sample_inputs=batch())
    with pytest.raises(tw.PlanError, match="already optimized"):
        tw.optimize(opt, sample_inputs=batch())
    assert_close(before, weights_of(model))
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == keys
    torch.testing.assert_close(opt(*batch()), model(*batch()))


@pytest.mark.parametrize("wrap", [lambda o: [o], lambda o: torch.optim.lr_scheduler.StepLR(o, 1)], ids=["list", "scheduler"])
def test_what_is_no_optimizer_is_refused_by_name(wrap):
    model = torch.nn.Sequential(torch.nn.Embedding(5, 2))
    given = wrap(torch.optim.Adagrad(model.parameters()))
    with pytest.raises(tw.PlanError, match=f"optimizer= is a {type(given).__name__}, not a torch.optim.Optimizer"):
        tw.optimize(model, optimizer=given, sample_inputs=(torch.arange(3),))
    assert model(torch.arange(3)).shape == (3, 2)


def test_a_plain_functional_lookup_is_named_by_its_line():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(ROWS, 4))

        def forward(self, ids):
            return F.embedding(ids, self.w)

    opt = tw.optimize(Functional(), sample_inputs=(torch.tensor([1]),))
    with pytest.raises(IndexError, match=r"embedding at test_bad_input.py:\d+.*table 'w'"):
        opt(torch.tensor([ROWS]))
