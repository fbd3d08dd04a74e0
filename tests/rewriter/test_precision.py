"""``plan.precision``: the whole model through ``optimize``, trained with and without a loss scaler."""
from __future__ import annotations

import copy

import pytest
import tablewright as tw
import torch
from small_models import Dot, dot_batch, gradients_of, weights_of
from tablewright.rewriter.errors import InBackwardError, PlanError, VerifyError
from torch import nn

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def optimized(precision="bf16", model=None, **more):
    plan = tw.Plan(precision=precision, **{k: more.pop(k) for k in ("embedding_optimizer", "numerics", "passes") if k in more})
    return tw.optimize(model or Dot(), plan, sample_inputs=dot_batch(), **more)


def loss_of(model, batch):
    target = (batch[1] % 2).float()
    return nn.functional.binary_cross_entropy_with_logits(model(*batch), target)


@pytest.mark.parametrize("precision", LOW)
def test_outputs_gradients_and_state(precision):
    torch.manual_seed(0)
    plain = Dot()
    opt = optimized(precision, plain)
    assert list(opt.state_dict()) == list(plain.state_dict())
    assert all(v.dtype == torch.float32 for v in opt.state_dict().values())
    for train in (True, False):
        plain.train(train), opt.train(train)
        for rows in (5, 1, 0, 7):
            batch = dot_batch(rows, seed=rows)
            out = opt(*batch)
            assert out.dtype == torch.float32
            torch.testing.assert_close(out, plain(*batch), rtol=2e-2, atol=1e-2)
    twin = copy.deepcopy(plain)
    loss_of(twin, dot_batch()).backward()
    loss_of(opt, dot_batch()).backward()
    for (name, a), b in zip(gradients_of(twin).items(), gradients_of(opt).values()):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b, a, rtol=0, atol=5e-2 * float(a.abs().max()), msg=name)
    assert opt.report.coverage["ops"][0] >= 3
    assert "in low precision" in str(opt.report) and "stay in float32" in str(opt.report)
    assert precision in opt.explain("over.0")


def test_check_and_verify_allow_the_rounding_and_no_more():
    opt = tw.optimize(Dot(), tw.Plan(precision="bf16"), sample_inputs=dot_batch(), verify="numerics")
    assert not [r for r in opt.report.records if r.status == "REJECTED"]
    assert opt.check(*dot_batch())
    module = opt.get_submodule("over.0")
    broken = [v for v in opt._variants][0].graph
    product = next(n for n in broken.nodes if str(n.target) == "aten.linear.default")
    product.update_arg(2, None)
    assert module.bias.abs().max() > 0.1
    with pytest.raises(VerifyError, match="DIFFERENT"):
        opt.check(*dot_batch()).raise_if_failed()


@pytest.mark.parametrize("precision", LOW)
def test_training_with_a_loss_scaler(precision):
    """Steps are taken, a step with infinite gradients is skipped, and the scale is halved."""
    torch.manual_seed(0)
    plain = Dot(sparse=True)
    twin = copy.deepcopy(plain)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    opt, optimizer = optimized(precision, plain, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    other = torch.optim.SGD(twin.parameters(), lr=0.5)
    first = loss_of(opt, dot_batch()).item()
    for _ in range(20):
        for model, step in ((opt, optimizer), (twin, other)):
            step.zero_grad()
            loss = loss_of(model, dot_batch())
            if model is opt:
                scaler.scale(loss).backward()
                assert all(p.grad.dtype == torch.float32 for p in opt.parameters())
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                step.step()
    assert loss_of(opt, dot_batch()).item() < 0.7 * first
    for a, b in zip(weights_of(twin).values(), weights_of(opt).values()):
        torch.testing.assert_close(b, a, rtol=5e-2, atol=5e-2)
    before, scale = weights_of(opt), scaler.get_scale()
    optimizer.zero_grad()
    scaler.scale(loss_of(opt, dot_batch()) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights_of(opt).values()))
    assert scaler.get_scale() == scale / 2


def test_fp16_gradients_that_overflow_are_found_by_the_scaler():
    plain = Dot()
    opt, optimizer = optimized("fp16", plain, optimizer=torch.optim.SGD(plain.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    scaler.scale(loss_of(opt, dot_batch())).backward()
    assert not plain.over[0].weight.grad.isfinite().all()
    before = weights_of(opt)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights_of(opt).values())) and scaler.get_scale() == 2.0**23


def test_updates_in_the_backward():
    """bf16 goes with them; fp16 needs loss scaling, which does not; nor does a scaler."""
    rowwise = tw.RowwiseAdagrad(lr=0.1, in_backward=True)
    with pytest.raises(PlanError, match="inside the backward and computes in fp16.*precision: bf16"):
        optimized("fp16", embedding_optimizer=rowwise)
    opt = optimized("bf16", embedding_optimizer=rowwise)
    before = weights_of(opt)
    loss_of(opt, dot_batch()).backward()
    assert not torch.equal(before["user.weight"], opt.user.weight)
    opt.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    before = weights_of(opt)
    with pytest.raises(InBackwardError, match="GradScaler"):
        scaler.scale(loss_of(opt, dot_batch())).backward()
    assert torch.equal(before["user.weight"], opt.user.weight)


def test_under_autocast_and_compiled():
    opt = optimized()
    out = opt(*dot_batch())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(opt(*dot_batch()).float(), out, rtol=2e-2, atol=1e-2)
    compiled = torch.compile(opt, backend="aot_eager", fullgraph=True)
    compiled(*dot_batch()).sum().backward()
    grads = gradients_of(opt)
    opt.zero_grad()
    opt(*dot_batch()).sum().backward()
    for a, b in zip(grads.values(), gradients_of(opt).values()):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_copies_and_loaded_weights_are_followed():
    """Nothing of a cast outlives its step."""
    opt = optimized()
    twin = copy.deepcopy(opt)
    other = Dot()
    twin.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(twin(*dot_batch()), other(*dot_batch()), rtol=2e-2, atol=1e-2)
    with torch.no_grad():
        opt.over[0].weight.zero_()
        opt.over[0].bias.zero_()
    assert opt(*dot_batch()).unique().numel() == 1


def test_a_loss_in_the_graph_is_float32():
    class WithLoss(Dot):
        def calculate_loss(self, *batch):
            return loss_of(self, batch)

    model = WithLoss()
    opt = tw.optimize(
        model, tw.Plan(precision="bf16"), methods=["calculate_loss"], sample_inputs={"forward": dot_batch(), "calculate_loss": dot_batch()}
    )
    loss = opt.calculate_loss(*dot_batch())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model.calculate_loss(*dot_batch()), rtol=1e-2, atol=1e-3)
    logits = opt(*dot_batch())
    target = (dot_batch()[1] % 2).float()
    torch.testing.assert_close(loss, nn.functional.binary_cross_entropy_with_logits(logits, target), rtol=1e-5, atol=1e-6)


def test_what_forbids_low_precision_is_named():
    with pytest.raises(PlanError, match="passes.mixed_precision: false forbids"):
        tw.Plan(precision="bf16", passes={"mixed_precision": False})
    with pytest.raises(PlanError, match="say precision: bf16 at the top"):
        tw.Plan(passes={"mixed_precision": {"precision": "bf16"}})


def test_fp32_is_the_plan_that_says_nothing():
    opt = tw.optimize(Dot(), sample_inputs=dot_batch())
    assert "ops" not in opt.report.coverage and tw.Plan() == tw.Plan(precision="fp32") and "precision" not in tw.Plan().to_dict()
    assert tw.Plan.from_dict(tw.Plan(precision="fp16").to_dict()).precision == "fp16"
