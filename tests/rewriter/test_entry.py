"""The guards of a variant as one function: it lets through what the guards let through, and nothing else."""
from __future__ import annotations

import pytest
import tablewright as tw
import torch
from tablewright.rewriter.errors import CaptureError
from torch import nn
from torch.nn.utils import parametrize


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(20, 4) for _ in range(3))
        self.head = nn.Linear(12, 2)
        self.scale, self.sizes, self.on = 2.0, [3, 4], True
        self.register_buffer("shift", torch.ones(2))

    def forward(self, ids, dense=None, *, power=1):
        found = torch.cat([t(i) for t, i in zip(self.tables, ids["ids"])], -1) * self.scale + self.sizes[0]
        if self.on:
            found = found + 1
        out = (self.head(found) + self.shift) ** power
        return {"out": out if dense is None else out + dense, "found": found}


def batch(rows=5):
    return {"ids": [torch.randint(20, (rows,)) for _ in range(3)]}


@pytest.fixture
def made():
    torch.manual_seed(0)
    model = Model()
    opt = tw.optimize(model, sample_inputs=(batch(),))
    check(model, opt, batch())
    return model, opt


def check(model, opt, *args, **kwargs):
    want, got = model(*args, **kwargs), opt(*args, **kwargs)
    assert list(want) == list(got)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def enters(opt, *args, **kwargs):
    return [variant.enter(args, kwargs) is not None for variant in opt._variants]


def test_calls_like_the_captured_one_enter_at_once(made, monkeypatch):
    model, opt = made
    monkeypatch.setattr(opt._variants[0].captured.guards, "failure", lambda *_: pytest.fail("the guards were asked one by one"))
    for rows in (5, 1, 0, 300):
        assert enters(opt, batch(rows)) == [True]
        check(model, opt, batch(rows))


def test_other_inputs_do_not(made):
    model, opt = made
    ids = batch()["ids"]
    for other in (
        {"ids": ids[:2]}, {"ids": tuple(ids)}, {"other": ids}, {"ids": ids, "more": ids}, {"ids": [i.int() for i in ids]}, ids,
        {"ids": [ids[0][None], *ids[1:]]}, {"ids": [ids[0].to("meta"), *ids[1:]]}, {"ids": [None, *ids[1:]]}, {"ids": ids[0]},
        {"ids": [ids[0].as_subclass(type("Mine", (torch.Tensor,), {})), *ids[1:]]},
    ):  # fmt: skip
        assert enters(opt, other) == [False]
    assert enters(opt, batch(), None) == [False] and enters(opt) == [False] and enters(opt, batch(), power=1) == [False]
    check(model, opt, batch(), dense=torch.ones(2), power=2)
    check(model, opt, batch())
    assert enters(opt, batch(), dense=torch.ones(2), power=2) == [False, True]
    assert enters(opt, batch(), dense=torch.ones(2), power=3) == [False, False]


@pytest.mark.parametrize("on_shell", [False, True])
@pytest.mark.parametrize("change", [
    lambda m: setattr(m, "scale", 3.0), lambda m: setattr(m, "scale", 2), lambda m: m.sizes.append(1),
    lambda m: m.sizes.__setitem__(0, 9), lambda m: setattr(m, "on", False), lambda m: setattr(m, "on", 1),
    lambda m: setattr(m.tables[1], "padding_idx", 3), lambda m: delattr(m, "scale"),
])  # fmt: skip
def test_a_changed_attribute_is_seen(made, change, on_shell):
    model, opt = made
    change(opt._shell if on_shell else model)
    assert enters(opt, batch()) == [False]


def test_an_equal_value_in_a_new_object_still_runs(made):
    model, opt = made
    model.scale = float("2.0")
    model.sizes = [3, 4]
    check(model, opt, batch())
    assert len(opt._variants) == 1


def test_a_replaced_parameter_of_the_plain_model_is_seen(made):
    model, opt = made
    model.head.weight = nn.Parameter(torch.zeros(2, 12))
    assert enters(opt, batch()) == [False]
    with pytest.raises(CaptureError, match="weight' of the plain model was replaced"):
        opt(batch())


def test_the_users_model_may_go(made):
    model, opt = made
    want = model(ids := batch())
    del model, made
    assert enters(opt, ids) == [True]
    torch.testing.assert_close(opt(ids)["out"], want["out"])


def test_tensors_are_read_where_they_are_now(made):
    model, opt = made
    del made
    opt.load_state_dict({k: v + 1 for k, v in opt.state_dict().items()}, assign=True)
    plain = opt.unoptimized()
    check(plain, opt, ids := batch())
    opt.double()
    plain.double()
    check(plain, opt, ids)
    opt.tables[1] = nn.Embedding(20, 4).double()
    plain.tables[1].load_state_dict(opt.tables[1].state_dict())
    check(plain, opt, ids)

    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    for m in (opt, plain):
        parametrize.register_parametrization(m.head, "weight", Twice())
    check(plain, opt, ids)


class Measured:
    """A registered input class that looks at its tensor when it is made, as torchrec's KeyedJaggedTensor does."""

    def __init__(self, values):
        self.values, self.count = values, values.numel()


torch.utils._pytree.register_pytree_node(
    Measured, lambda m: ([m.values], None), lambda leaves, _: Measured(*leaves), serialized_type_name="test_entry.Measured"
)  # fmt: skip


class TakesMeasured(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 4)

    def forward(self, given):
        return self.table(given.values).sum(1)


def test_an_input_class_that_cannot_be_made_of_anything_but_tensors():
    model, ids = TakesMeasured(), torch.randint(20, (5, 3))
    opt = tw.optimize(model, sample_inputs=(Measured(ids),))
    torch.testing.assert_close(opt(Measured(ids[:2])), model(Measured(ids[:2])))
