"""The module that ``optimize`` returns: the user's model untouched, parameters shared, and everything else as on the plain one."""
from __future__ import annotations

import copy
import inspect
import random

import numpy
import pytest
import tablewright as tw
import torch
from small_models import Dot, Tied, assert_close, dot_batch, gradients_of, tied_batch, weights_of
from torch import nn


def optimized(**more):
    torch.manual_seed(0)
    model = Dot(**more)
    return model, tw.optimize(model, sample_inputs=dot_batch())


# --- the user's model ---------------------------------------------------------------------------------------------------------


def _fingerprint(model: nn.Module) -> list:
    """Everything of every module's ``__dict__``, tensors by identity, version and bits."""
    found: list = []

    def walk(value):
        if isinstance(value, torch.Tensor):
            writes = value._version if isinstance(value, nn.Parameter) else "any"  # buffers may be written and put back
            found.append((id(value), writes, value.requires_grad, value.grad, value.tolist(), value._backward_hooks))
        elif isinstance(value, nn.Module):
            found.append((id(value), type(value)))
            walk(value.__dict__)
        elif isinstance(value, dict):
            for key, item in value.items():
                found.append(key)
                walk(item)
        elif isinstance(value, (list, tuple, set)):
            found.append(len(value))
            for item in value:
                walk(item)
        else:
            found.append((id(type(value)), repr(value)))

    walk(model)
    return found


class Stateful(Dot):
    """With everything that could be changed: buffers, batch norm, a frozen table, hooks, modes, lists, an attribute."""

    def __init__(self):
        super().__init__(dropout=0.5)
        self.norm = nn.BatchNorm1d(17)
        self.register_buffer("calls", torch.zeros(2))
        self.item.weight.requires_grad_(False)
        self.tags.eval()
        self.seen = [1, {"a": torch.ones(2)}]

    def forward(self, dense, user, item, tags):
        self.calls.add_(1)
        x = torch.cat([dense, self.user(user), self.item(item), self.tags(tags)], dim=1)
        return self.over(self.norm(x)).squeeze(1)


@pytest.mark.parametrize("verify", ["structure", "numerics"])
def test_the_users_model_is_untouched(verify):
    model = Stateful()
    model.register_forward_hook(lambda *_: None)
    model.user.weight.register_hook(lambda g: g * 1)
    optimizer = torch.optim.Adagrad([p for p in model.parameters() if p.requires_grad])
    kept = copy.deepcopy(optimizer.state_dict())
    before = _fingerprint(model)
    states = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    opt, _ = tw.optimize(model, sample_inputs=[dot_batch(5), dot_batch(3)], optimizer=optimizer, verify=verify)
    opt.check(*dot_batch())
    opt.bisect(*dot_batch())
    after = states[0], states[1], str(numpy.random.get_state())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1] and after[2] == states[2]
    assert _fingerprint(model) == before
    assert str(optimizer.state_dict()) == str(kept)
    assert opt.calls is model.calls and float(model.calls[0]) == 0


def test_parameters_and_buffers_are_the_same_objects():
    model, opt = optimized()
    assert [(n, id(p)) for n, p in opt.named_parameters()] == [(n, id(p)) for n, p in model.named_parameters()]
    model = Tied()
    opt = tw.optimize(model, sample_inputs=tied_batch())
    assert [n for n, _ in opt.named_parameters()] == [n for n, _ in model.named_parameters()] == ["query.weight", "wide.weight"]
    assert opt.query.weight is opt.document.weight is model.query.weight


def test_training_the_result_trains_the_users_weights():
    model, opt = optimized()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights_of(model)
    opt(*dot_batch()).sum().backward()
    optimizer.step()
    assert not torch.equal(before["user.weight"], model.user.weight)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(opt).values(), weights_of(model).values()))


def test_copy_is_independent():
    model = Dot()
    opt = tw.optimize(model, sample_inputs=dot_batch(), copy=True)
    ours = {p.data_ptr() for p in opt.parameters()}
    assert not ours & {p.data_ptr() for p in model.parameters()}
    with pytest.raises(tw.PlanError, match="copy=True"):
        tw.optimize(model, sample_inputs=dot_batch(), copy=True, optimizer=torch.optim.SGD(model.parameters(), lr=1))


# --- behaviour ----------------------------------------------------------------------------------------------------------------


class Modes(nn.Module):
    """Dropout as a module, as a function, and a branch on ``self.training``."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.drop = nn.Dropout(0.4)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, ids):
        x = nn.functional.dropout(self.drop(self.table(ids)), 0.3, self.training)
        x = self.norm(x)
        return x * 2 if self.training else x


def test_a_batch_norm_of_one_row_is_refused_in_training_and_keeps_its_statistics():
    model = Modes()
    opt = tw.optimize(model, sample_inputs=(torch.randint(0, 50, (30,)),))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        opt(torch.tensor([3]))
    assert model.norm.running_var.isfinite().all()
    assert opt.eval()(torch.tensor([3])).isfinite().all()


def test_train_and_eval_are_those_of_the_plain_model():
    torch.manual_seed(0)
    model = Modes()
    plain = copy.deepcopy(model)
    ids = torch.randint(0, 50, (30,))
    opt = tw.optimize(model, sample_inputs=(ids,))
    assert opt.training
    for mode in (True, False, True):
        opt.train(mode), plain.train(mode)
        results = []
        for each in (plain, opt):
            torch.manual_seed(3)
            results.append(each(ids))
        torch.testing.assert_close(results[0], results[1])
        assert {m.training for m in opt.modules()} == {mode}
    assert model.training and model.drop.training, "the user's own model keeps its mode"
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(opt.named_buffers())[name], buffer)


def test_a_mode_of_one_submodule():
    _, opt = optimized(dropout=0.5)
    batch = dot_batch(64)
    opt.over.eval()
    assert torch.equal(opt(*batch), opt(*batch)), "no dropout in a part that is in eval mode"
    opt.over.train()
    assert not torch.equal(opt(*batch), opt(*batch))


def test_frozen_tables_stay_frozen_and_can_be_thawed():
    model = Dot()
    model.user.weight.requires_grad_(False)
    opt = tw.optimize(model, sample_inputs=dot_batch())
    opt(*dot_batch()).sum().backward()
    assert opt.user.weight.grad is None and opt.item.weight.grad is not None
    opt.user.weight.requires_grad_(True)
    opt(*dot_batch()).sum().backward()
    assert opt.user.weight.grad is not None


def test_a_table_frozen_by_the_plan_gets_no_gradient():
    opt = tw.optimize(Dot(), tw.Plan(tables={"user": tw.TablePlan(trainable=False)}), sample_inputs=dot_batch())
    opt(*dot_batch()).sum().backward()
    assert opt.user.weight.grad is None and opt.item.weight.grad is not None and opt.user.weight.requires_grad


@pytest.mark.parametrize("change", [lambda m: m.to(torch.float64), lambda m: m.half(), lambda m: m.bfloat16()])
def test_dtype_changes(change):
    model, opt = optimized()
    plain = copy.deepcopy(model)
    change(opt), change(plain)
    dtype = plain.user.weight.dtype
    batch = (dot_batch()[0].to(dtype), *dot_batch()[1:])
    a, b = plain(*batch), opt(*batch)
    assert b.dtype == a.dtype == dtype
    torch.testing.assert_close(a, b)
    a.sum().backward(), b.sum().backward()
    for name, grad in gradients_of(plain).items():
        tolerance = 1e-9 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps * float(grad.abs().max())
        torch.testing.assert_close(gradients_of(opt)[name], grad, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def test_attributes_methods_and_signature():
    model, opt = optimized()
    assert opt.temperature == 2.0 and opt.describe() == "a Dot with temperature 2.0"
    opt.temperature = 4.0
    assert opt.describe() == "a Dot with temperature 4.0" and model.temperature == 2.0
    plain = copy.deepcopy(model)
    plain.temperature = 4.0
    torch.testing.assert_close(opt(*dot_batch()), plain(*dot_batch()))  # never the stale graph
    assert inspect.signature(opt.forward) == inspect.signature(model.forward)
    assert opt.forward.__doc__ == Dot.forward.__doc__ and type(opt).__name__ == "OptimizedDot"
    assert isinstance(opt, tw.OptimizedModel) and {"describe", "temperature", "user"} <= set(dir(opt))
    with pytest.raises(AttributeError, match="nothing"):
        _ = opt.nothing


def test_keyword_arguments_and_other_structures_recapture():
    model, opt = optimized()
    dense, user, item, tags = dot_batch()
    torch.testing.assert_close(opt(dense, user, tags=tags, item=item), model(dense, user, item, tags))
    torch.testing.assert_close(opt(dense, user.int(), item, tags), model(dense, user, item, tags))
    with pytest.raises((tw.CaptureError, TypeError)):
        opt(dense, user)
    torch.testing.assert_close(opt(dense, user, item, tags), model(dense, user, item, tags))


def test_hooks_on_the_result_run_and_hooks_inside_are_refused():
    _, opt = optimized()
    seen = []
    opt.register_forward_hook(lambda module, args, result: seen.append(tuple(result.shape)))
    opt(*dot_batch())
    assert seen == [(5,)]
    with pytest.raises(tw.CaptureError, match="'user'"):
        opt.user.register_forward_hook(lambda *_: None)


# --- what it says -------------------------------------------------------------------------------------------------------------


def test_explain():
    model, opt = optimized()
    assert opt.explain("user").startswith("APPLIED group_tables: user (small_models.py:")
    assert "SKIPPED table_gradients: user.weight: no optimizer was given" in opt.explain("user")
    assert "SKIPPED dense_chains: over.0" in opt.explain("over") and "million multiply-adds" in opt.explain("over")
    assert "runs as in the plain model" in opt.explain("over.1")
    assert opt.explain("").count("\n") + 1 == len(opt.report.records)
    with pytest.raises(KeyError, match="no module or parameter 'usr'.*did you mean 'user'"):
        opt.explain("usr")


def test_optimize_twice_is_an_error():
    _, opt = optimized()
    with pytest.raises(tw.PlanError, match=r"already optimized: call .unoptimized\(\) first"):
        tw.optimize(opt, sample_inputs=dot_batch())
    with pytest.raises(tw.PlanError, match="its submodule '0' is already optimized"):
        tw.optimize(nn.Sequential(opt), sample_inputs=dot_batch())
    again = tw.optimize(opt.unoptimized(), sample_inputs=dot_batch())
    torch.testing.assert_close(again(*dot_batch()), opt(*dot_batch()))


def test_unoptimized_is_the_plain_class_with_todays_weights():
    model, opt = optimized()
    torch.nn.init.ones_(opt.user.weight)
    opt.eval()
    plain = opt.unoptimized()
    assert type(plain) is Dot and not plain.training and plain.user.weight.detach().eq(1).all()
    assert plain.user.weight is not opt.user.weight
    assert list(plain.state_dict()) == list(model.state_dict()) and set(plain.__dict__) == set(model.__dict__)
    plain.user.register_forward_hook(lambda *_: None)  # it is a plain model: hooks are allowed
    torch.testing.assert_close(plain(*dot_batch()), opt(*dot_batch()))


def test_check_says_yes_and_changes_nothing():
    model = Dot(dropout=0.5)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    opt, optim = tw.optimize(model, sample_inputs=dot_batch(), optimizer=optimizer)
    before, state = weights_of(opt), str(optim.state_dict())
    found = opt.check(*dot_batch())
    assert found and {d.what for d in found.differences} >= {"output 0", "gradient of user.weight", "user.weight after a step"}
    found.raise_if_failed()
    assert "agree" in str(found) and "DIFFERENT" not in str(found)
    assert str(optim.state_dict()) == state and all(torch.equal(a, b) for a, b in zip(before.values(), weights_of(opt).values()))
    assert all(p.grad is None for p in opt.parameters())


def test_check_says_no_where_the_graph_is_wrong():
    _, opt = optimized()
    graph = opt.graph_module.graph
    relu = next(n for n in graph.nodes if "relu" in str(n.target))
    relu.target = torch.ops.aten.gelu.default
    found = opt.check(*dot_batch())
    assert not found and "DIFFERENT: output 0" in str(found)
    with pytest.raises(tw.VerifyError, match="DIFFERENT"):
        found.raise_if_failed()


def test_dense_parameters_and_table_names():
    _, opt = optimized()
    assert opt.table_names() == ["user.weight", "item.weight", "tags.weight"]
    dense = {id(p) for p in opt.dense_parameters()}
    assert dense == {id(p) for p in opt.over.parameters()}
    tied = tw.optimize(Tied(), sample_inputs=tied_batch())
    assert list(tied.dense_parameters()) == [] and tied.table_names() == ["query.weight", "wide.weight"]


def test_same_gradients_as_plain():
    for model, batch in ((Dot(), dot_batch()), (Tied(), tied_batch()), (Dot(sparse=True), dot_batch())):
        plain = copy.deepcopy(model)
        opt = tw.optimize(model, sample_inputs=batch)
        a, b = plain(*batch), opt(*batch)
        torch.testing.assert_close(a, b)
        a.square().sum().backward(), b.square().sum().backward()
        assert_close(gradients_of(plain), gradients_of(opt))


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(9, 4)

    def forward(self, ids):
        return self.rows(ids) * getattr(self, "temperature", 1.0)


def test_attributes_that_are_set_later_belong_to_the_plain_model():
    opt, ids = tw.optimize(Tempered(), sample_inputs=(torch.arange(6),)), torch.arange(6)
    before = opt(ids)
    opt.temperature = 2.0
    assert torch.equal(opt(ids), 2 * before)
    twin = copy.deepcopy(opt)
    assert twin.temperature == 2.0 and torch.equal(twin(ids), 2 * before) and opt.unoptimized().temperature == 2.0
    del opt.temperature
    assert torch.equal(opt(ids), before) and torch.equal(twin(ids), 2 * before)


def test_a_deep_copy_keeps_hooks_and_their_handles_are_its_own():
    opt, ids = tw.optimize(Tempered(), sample_inputs=(torch.arange(6),)), torch.arange(6)
    handle, before = opt.register_forward_hook(lambda module, args, result: 3 * result), opt(ids)
    twin = copy.deepcopy(opt)
    handle.remove()
    assert torch.equal(twin(ids), before) and not torch.equal(opt(ids), before)
    twin.load_state_dict({name: value + 1 for name, value in opt.state_dict().items()}, assign=True)
    torch.testing.assert_close(twin(ids), 3 * (opt(ids) + 1))
