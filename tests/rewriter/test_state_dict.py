"""Loading and saving: plain names and shapes, both ways, strict, at any moment; copies of the whole model."""
from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import tablewright as tw
import torch
from small_models import Dot, Tied, assert_close, dot_batch, tied_batch, weights_of
from torch import nn

IN_BACKWARD = tw.Plan(embedding_optimizer=tw.Adagrad(lr=0.1, in_backward=True))
STEPPED = tw.Plan(embedding_optimizer=tw.Adagrad(lr=0.1))


def pair(make=Dot, batch=None, plan="auto"):
    torch.manual_seed(0)
    model = make()
    return model, tw.optimize(model, plan, sample_inputs=batch or dot_batch())


def assert_equal_states(a, b):
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def one_step(opt, batch=None):
    """One training step; the plan's optimizer moves the tables."""
    opt(*(batch or dot_batch())).square().sum().backward()
    if opt.embedding_optimizer is not None and not opt.embedding_optimizer.param_groups[0]["in_backward"]:
        opt.embedding_optimizer.step()
    for p in opt.parameters():
        p.grad = None


def test_both_ways_strict_in_the_same_order():
    for make, batch in ((Dot, dot_batch()), (Tied, tied_batch())):
        model, opt = pair(make, batch)
        assert_equal_states(opt.state_dict(), model.state_dict())
        other = make()
        opt.load_state_dict(other.state_dict())
        torch.testing.assert_close(opt(*batch), other(*batch))
        fresh = make()
        fresh.load_state_dict(opt.state_dict())
        assert_equal_states(fresh.state_dict(), other.state_dict())
        assert model.state_dict()[list(other.state_dict())[0]].eq(list(other.state_dict().values())[0]).all(), "shared weights"


def test_strict_and_not_strict():
    _, opt = pair()
    state = opt.state_dict()
    missing = {k: v for k, v in state.items() if k != "user.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"user.weight\""):
        opt.load_state_dict(missing)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        opt.load_state_dict({**state, "extra": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch for user.weight"):
        opt.load_state_dict({**state, "user.weight": torch.ones(3, 4)})
    result = opt.load_state_dict({**missing, "extra": torch.ones(1)}, strict=False)
    assert result.missing_keys == ["user.weight"] and result.unexpected_keys == ["extra"]


def test_nested_inside_a_parent_module():
    class Parent(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.bias = inner, nn.Parameter(torch.ones(1))

        def forward(self, *args):
            return self.inner(*args) + self.bias

    model, opt = pair()
    plain, parent = Parent(copy.deepcopy(model)), Parent(opt)
    assert list(parent.state_dict()) == list(plain.state_dict())
    for p in plain.parameters():
        nn.init.normal_(p)
    parent.load_state_dict(plain.state_dict())
    torch.testing.assert_close(parent(*dot_batch()), plain(*dot_batch()))
    nn.init.normal_(plain.inner.user.weight)
    parent.load_state_dict(plain.state_dict(), assign=True)
    torch.testing.assert_close(parent(*dot_batch()), plain(*dot_batch()))
    parent.double(), plain.double()
    batch = (dot_batch()[0].double(), *dot_batch()[1:])
    torch.testing.assert_close(parent(*batch), plain(*batch))


@pytest.mark.parametrize("plan", ["auto", IN_BACKWARD, STEPPED], ids=["auto", "in_backward", "stepped"])
@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside a parent"])
def test_assign_replaces_what_is_read_and_what_is_updated(plan, inside):
    _, opt = pair(plan=plan)
    other = Dot()
    state = copy.deepcopy(other.state_dict())
    if inside:
        nn.Sequential(opt).load_state_dict({f"0.{k}": v for k, v in state.items()}, assign=True)
    else:
        opt.load_state_dict(state, assign=True)
    assert opt.user.weight.data_ptr() == state["user.weight"].data_ptr()
    torch.testing.assert_close(opt(*dot_batch()), other(*dot_batch()))
    before = weights_of(opt)
    one_step(opt)
    if plan != "auto":
        assert not torch.equal(opt.user.weight, before["user.weight"]), "the new Parameter is the one that is trained"
        table, _ = opt.embedding_optimizer._by_name["user.weight"]
        assert table is opt.user.weight


@pytest.mark.parametrize("plan", ["auto", STEPPED], ids=["auto", "stepped"])
def test_replaced_tables_are_not_kept_alive(plan):
    opt = pair(plan=plan)[1]
    one_step(opt)
    old = weakref.ref(opt.user.weight)
    opt.load_state_dict(copy.deepcopy(Dot().state_dict()), assign=True)
    gc.collect()
    assert old() is None


def test_a_model_built_on_the_meta_device():
    model = Dot()
    for load in ("assign", "to_empty"):
        with torch.device("meta"):
            empty = Dot()
        opt = tw.optimize(empty)
        assert opt.report.coverage["lookups"] == (3, 3) and opt.user.weight.is_meta
        if load == "assign":
            opt.load_state_dict(model.state_dict(), assign=True)
        else:
            opt.to_empty(device="cpu")
            opt.load_state_dict(model.state_dict())
        torch.testing.assert_close(opt(*dot_batch()), model(*dot_batch()))


@pytest.mark.parametrize("plan", ["auto", IN_BACKWARD, STEPPED], ids=["auto", "in_backward", "stepped"])
def test_deepcopy_is_independent(plan):
    _, opt = pair(plan=plan)
    one_step(opt)
    twin = copy.deepcopy(opt)
    assert type(twin) is type(opt) and not {id(p) for p in twin.parameters()} & {id(p) for p in opt.parameters()}
    kept = weights_of(opt)
    for _ in range(2):
        one_step(twin)
    assert_equal_states(weights_of(opt), kept)
    if plan != "auto":
        assert not torch.equal(twin.user.weight, kept["user.weight"])
        for _ in range(2):
            one_step(opt)
        assert_close(weights_of(opt), weights_of(twin))  # the optimizer's state was copied too
    twin.over[0].weight.data.zero_()
    assert not opt.over[0].weight.eq(0).all()


def test_a_copy_outlives_its_original():
    _, opt = pair(plan=IN_BACKWARD)
    twin = copy.deepcopy(opt)
    del opt
    gc.collect()
    before = weights_of(twin)
    one_step(twin)
    assert not torch.equal(twin.user.weight, before["user.weight"])


@pytest.mark.parametrize("plan", ["auto", IN_BACKWARD, STEPPED], ids=["auto", "in_backward", "stepped"])
def test_save_and_load_by_recipe(plan):
    _, opt = pair(plan=plan)
    one_step(opt)
    opt.eval()
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert isinstance(twin, tw.OptimizedModel) and twin.plan == opt.plan and not twin.training
    assert twin.report.coverage == opt.report.coverage
    assert_equal_states(twin.state_dict(), opt.state_dict())
    torch.testing.assert_close(twin(*dot_batch()), opt(*dot_batch()))
    for each in (opt, twin):
        one_step(each.train())
    assert_close(weights_of(opt), weights_of(twin))


def test_tied_tables_stay_tied_through_everything():
    model, opt = pair(Tied, tied_batch())
    for each in (copy.deepcopy(opt), opt.unoptimized(), opt.double()):
        assert each.query.weight is each.document.weight
    opt.load_state_dict(copy.deepcopy(opt.state_dict()), assign=True)
    torch.testing.assert_close(opt(*tied_batch()), copy.deepcopy(opt.unoptimized())(*tied_batch()))


def test_the_ticket_of_in_backward_plans_is_not_in_the_state():
    model, opt = pair(plan=IN_BACKWARD)
    one_step(opt)
    assert list(opt.state_dict()) == list(model.state_dict())
    assert not [n for n, _ in opt.named_buffers()]
