"""The user's optimizer stepped by torch's fused kernels: the plain step's numbers, and nothing of it left behind."""
from __future__ import annotations

import copy
import functools

import pytest
import torch
from tablewright.kernels.dense.fused_step import fused_step, has_fused_step
from tablewright.kernels.embedding.row_wise import row_wise
from torch.optim import SGD, Adagrad, Adam, AdamW

MAKERS = {
    "adagrad": functools.partial(Adagrad, lr=0.1, lr_decay=0.1, weight_decay=0.01, eps=1e-6),
    "adagrad, maximize": functools.partial(Adagrad, lr=0.1, maximize=True, initial_accumulator_value=0.3),
    "adam": functools.partial(Adam, lr=0.1, betas=(0.8, 0.95), weight_decay=0.02),
    "adam, amsgrad": functools.partial(Adam, lr=0.1, amsgrad=True),
    "adamw": functools.partial(AdamW, lr=0.1, maximize=True),
}


def twins(make, dtype=torch.float32):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in ((7, 5), (3,), (1,))]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    return params, others, make(params), row_wise(make(others), [])


def give_gradients(params, others, step):
    for place, (p, q) in enumerate(zip(params, others)):
        grad = torch.randn_like(p) * (torch.rand_like(p) < 0.7)
        p.grad, q.grad = (None, None) if place == step % 4 else (grad, grad.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_same_numbers_as_the_plain_step(make, dtype, monkeypatch):
    params, others, plain, fused = twins(make, dtype)
    used = []
    name = "_fused_adagrad_" if isinstance(plain, Adagrad) else "_fused_adamw_" if isinstance(plain, AdamW) else "_fused_adam_"
    kernel = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda *args, **kwargs: used.append(1) or kernel(*args, **kwargs))
    assert has_fused_step(plain)
    for step in range(6):
        give_gradients(params, others, step)
        plain.step()
        assert not used
        fused.step()
        assert used
        used.clear()
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        for p, q in zip(params, others):
            torch.testing.assert_close(q, p, rtol=tolerance, atol=tolerance)
            for name, value in plain.state[p].items():
                torch.testing.assert_close(fused.state[q][name], value, rtol=tolerance, atol=tolerance)
        assert fused.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    again = copy.deepcopy(fused)
    again.load_state_dict(copy.deepcopy(plain.state_dict()))
    give_gradients(params, again.param_groups[0]["params"], 3)
    plain.step()
    again.step()
    torch.testing.assert_close(again.param_groups[0]["params"][0], params[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": False}, {"lr": torch.tensor(0.1)}, {"differentiable": True}], ids=str)
def test_what_the_user_chose_stays(options):
    params, *_ = twins(MAKERS["adam"])
    optimizer = Adam(params, **options)
    with fused_step(optimizer):
        assert optimizer.param_groups[0]["fused"] is options.get("fused")


def test_what_does_not_fit_is_left_alone():
    for change in ("bfloat16", "sparse", "strides"):
        param = torch.nn.Parameter(torch.randn(4, 6, dtype=torch.bfloat16 if change == "bfloat16" else torch.float32))
        param.grad = torch.randn_like(param)
        if change == "sparse":
            param.grad = param.grad.to_sparse(1)
        if change == "strides":
            param.grad = torch.randn(6, 4).t()
        optimizer = Adagrad([param])
        with fused_step(optimizer):
            assert optimizer.param_groups[0]["fused"] is None, change
    sgd = SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with fused_step(sgd):
        assert sgd.param_groups[0]["fused"] is None
    assert not has_fused_step(sgd)


def test_an_error_leaves_the_choice_open():
    params, _, optimizer, _ = twins(MAKERS["adam"])
    with pytest.raises(ZeroDivisionError), fused_step(optimizer):
        assert optimizer.param_groups[0]["fused"] is True
        raise ZeroDivisionError
    assert optimizer.param_groups[0]["fused"] is None


@pytest.mark.parametrize("change", ["", "scheduled", "foreach in one group", "two dtypes", "strides", "scaled"])
def test_adagrad_of_several_groups_at_once(change, monkeypatch):
    """In two calls of torch for each group; where one group needs the plain step it does all of them. The same numbers either way."""

    def make(params):
        tail = [*params[1:], torch.nn.Parameter(torch.ones(2, dtype=torch.float64))] if change == "two dtypes" else params[1:]
        return Adagrad([{"params": params[:1]}, {"params": tail, "lr": 0.3, **({"foreach": False} if change == "foreach in one group" else {})}], lr=0.1)

    params, others, plain, ours = twins(make)
    asked = []
    own = Adagrad._init_group
    monkeypatch.setattr(Adagrad, "_init_group", lambda *args: asked.append(1) or own(*args))
    for step in range(3):
        give_gradients(params, others, step)
        for optimizer in (plain, ours):
            if change == "two dtypes":
                last = optimizer.param_groups[1]["params"][-1]
                last.grad = torch.ones_like(last)
            if change == "strides":
                first = optimizer.param_groups[0]["params"][0]
                first.grad = torch.arange(35.0).view(5, 7).t()
            if change == "scheduled":
                optimizer.param_groups[0]["lr"] = 0.2 / (step + 1)
            if change == "scaled":
                optimizer.grad_scale = None if optimizer is plain else torch.ones(())
        plain.step()
        asked.clear()
        ours.step()
        assert bool(asked) is (change not in ("", "scheduled"))
        for p, q in zip(params, others):
            torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours.state[q]["step"], plain.state[p]["step"])
