"""Ways in which a loop differs from the textbook one, each once found to give wrong numbers or an unnamed error."""
import copy
import os

import pytest
import tablewright as tw
import torch
import torch.utils.checkpoint
from tablewright.kernels.embedding import buffers
from torch import nn

IN_BACKWARD = tw.Plan(embedding_optimizer=tw.RowwiseAdagrad(lr=0.1, in_backward=True))


class Model(nn.Module):
    """Two tables and a dense branch that is concatenated with them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(50, 16), nn.Embedding(50, 16)
        self.scale = 1.0
        self.bottom, self.top = nn.Linear(4, 16), nn.Linear(48, 1)

    def forward(self, x, ids):
        joined = torch.cat([torch.relu(self.bottom(x)), self.a(ids[:, 0]), self.b(ids[:, 1])], 1)
        return self.top(joined) * self.scale


def batch(rows=32):
    return torch.randn(rows, 4), torch.randint(0, 50, (rows, 2))


def changed_hyperparameters(plain_optim, optim, name):
    if name == "a scheduler cycles momentum":
        return [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20) for o in (plain_optim, optim)]
    for optimizer in (plain_optim, optim):
        optimizer.param_groups[0]["weight_decay"] = 0.1
    return []


@pytest.mark.parametrize("name", ["a scheduler cycles momentum", "weight decay is set"])
def test_hyperparameters_that_change_after_optimize(name):
    plain = Model()
    model = copy.deepcopy(plain)
    optims = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, model)]
    opt, optims[1] = tw.optimize(model, optimizer=optims[1], sample_inputs=batch())
    schedulers = changed_hyperparameters(*optims, name)
    for _ in range(3):
        inputs = batch()
        for m, optim in zip((plain, opt), optims):
            m(*inputs).pow(2).mean().backward()
            optim.step()
            optim.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
    for p, q in zip(plain.parameters(), opt.parameters()):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_a_grad_scaler_leaves_its_work_to_fused_steps(kind, unscale):
    plain = Model().double()
    model = copy.deepcopy(plain)
    optims = [kind(m.parameters(), lr=0.1, fused=True) for m in (plain, model)]
    opt, optims[1] = tw.optimize(model, optimizer=optims[1], sample_inputs=(batch()[0].double(), batch()[1]))
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in optims]
    for factor in (1.0, float("inf"), 1.0):
        x, ids = batch()
        for m, optim, scaler in zip((plain, opt), optims, scalers):
            optim.zero_grad()
            scaler.scale(m(x.double(), ids).pow(2).mean() * factor).backward()
            if unscale:
                scaler.unscale_(optim)
            scaler.step(optim)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for p, q in zip(plain.parameters(), opt.parameters()):
            torch.testing.assert_close(q, p)
            if factor == 1.0:
                torch.testing.assert_close(q.grad.to_dense(), p.grad)
    for p, q in zip(plain.parameters(), opt.parameters()):
        assert optims[0].state[p].keys() == optims[1].state[q].keys()
        for key, value in optims[0].state[p].items():
            torch.testing.assert_close(optims[1].state[q][key], value)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("bad", ["a.weight", "top.weight"])
def test_clipping_by_a_norm_that_is_not_a_number(norm_type, bad):
    plain, inputs = Model(), batch()
    opt = tw.optimize(copy.deepcopy(plain), tw.Plan(embedding_optimizer=tw.SGD(lr=0.1)), sample_inputs=inputs)
    for m in (plain, opt):
        m(*inputs).sum().backward()
    opt.get_parameter(bad).grad.mul_(float("nan"))
    with pytest.raises(RuntimeError, match="is nan: nothing was clipped"):
        tw.clip_grad_norm_(opt, 1.0, norm_type, error_if_nonfinite=True)
    assert tw.clip_grad_norm_(opt, 1.0, norm_type).isnan()


def test_autograd_grad_trains_no_table():
    opt = tw.optimize(Model(), IN_BACKWARD, sample_inputs=batch())
    before = opt.a.weight.detach().clone()
    x, ids = batch()
    torch.autograd.grad(opt(x.requires_grad_(), ids).sum(), x)
    torch.autograd.grad(opt(x, ids).sum(), list(opt.dense_parameters()))
    assert torch.equal(before, opt.a.weight)
    opt(x, ids).sum().backward()
    assert not torch.equal(before, opt.a.weight)


def test_functional_call_with_other_tables_is_refused():
    opt = tw.optimize(Model(), IN_BACKWARD, sample_inputs=batch())
    others = {name: p.detach().clone().requires_grad_() for name, p in opt.named_parameters()}
    before = opt.a.weight.detach().clone()
    out = torch.func.functional_call(opt, others, batch())
    with pytest.raises(RuntimeError, match="'a.weight' was looked up in a tensor that is not the model's own"):
        out.sum().backward()
    assert torch.equal(before, opt.a.weight)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_capture_inside_a_functional_call_serves_later_calls(requires_grad):
    """There the parameters are plain tensors, which buffers are too, and those need no gradient."""
    plain, (x, ids) = Model(), batch()
    opt = tw.optimize(copy.deepcopy(plain), sample_inputs=(x, ids))
    for dtype in (torch.int32, torch.int64):
        others = {name: (p.detach() * 2).requires_grad_(requires_grad) for name, p in opt.named_parameters()}
        results = [torch.func.functional_call(m, others, (x, ids.to(dtype))) for m in (plain, opt)]
        torch.testing.assert_close(*results)
        if requires_grad:
            for theirs, ours in zip(*(torch.autograd.grad(r.square().sum(), list(others.values())) for r in results)):
                torch.testing.assert_close(ours.to_dense(), theirs)
        for m in (plain, opt):
            m(x, ids.to(dtype)).square().sum().backward()
    for p, q in zip(plain.parameters(), opt.parameters()):
        torch.testing.assert_close(q.grad.to_dense(), p.grad)


def test_a_capture_between_forward_and_backward():
    """It runs the plain model, whose batch norm writes the statistics that the earlier forward's graph holds, and puts them back."""
    plain, (_, ids) = nn.Sequential(nn.Embedding(50, 4), nn.BatchNorm1d(4)), batch()
    opt = tw.optimize(copy.deepcopy(plain), sample_inputs=(ids[:, 0],))
    for m in (plain, opt):
        (m(ids[:, 0]).square().sum() + m(ids[:, 1].int()).pow(3).sum()).backward()
    for p, q in zip([*plain.parameters(), *plain.buffers()], [*opt.parameters(), *opt.buffers()]):
        torch.testing.assert_close(q, p)
    for p, q in zip(plain.parameters(), opt.parameters()):
        torch.testing.assert_close(q.grad.to_dense(), p.grad)


def test_a_deep_copy_that_captures_again_updates_itself():
    opt = tw.optimize(Model(), IN_BACKWARD, sample_inputs=batch())
    twin = copy.deepcopy(opt)
    before, own = opt.a.weight.detach().clone(), twin.a.weight.detach().clone()
    twin.scale = 2.0
    twin(*batch()).sum().backward()
    assert torch.equal(before, opt.a.weight) and not torch.equal(own, twin.a.weight)


@pytest.mark.parametrize("limits", [{"numerics": "exact"}, {"passes": {"table_gradients": False}}])
@pytest.mark.parametrize("demand", [{"tables": {"a": tw.TablePlan(trainable=False)}},
                                    {"embedding_optimizer": tw.SGD(lr=0.1, in_backward=True)}])  # fmt: skip
def test_a_demand_that_no_pass_may_meet_is_an_error(limits, demand):
    with pytest.raises(tw.PlanError, match="the plan asks that table"):
        tw.optimize(Model(), tw.Plan(**limits, **demand), sample_inputs=batch())


def test_frozen_by_plan_survives_every_check():
    plan = tw.Plan(tables={"*": tw.TablePlan(trainable=False)})
    opt = tw.optimize(Model(), plan, sample_inputs=batch(), verify="numerics")
    assert opt.check(*batch())
    opt(*batch()).sum().backward()
    assert opt.a.weight.grad is None and opt.top.weight.grad is not None


class Parts(nn.Module):
    """Rows of one table as they are, beside a weighted bag of another, and both in one concatenation with what is given."""

    def __init__(self):
        super().__init__()
        self.fixed, self.other, self.trained = nn.Embedding(50, 4), nn.Embedding(50, 6), nn.EmbeddingBag(50, 8, mode="sum")
        self.fixed.requires_grad_(False)

    def forward(self, x, ids, weights):
        joined = torch.cat([x, self.fixed(ids[:, 1])], 1)
        return self.fixed(ids[:, 0]), joined, self.trained(ids, per_sample_weights=weights), self.other(ids[:, 0])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("plan", ["auto", IN_BACKWARD], ids=["step", "in backward"])
@pytest.mark.parametrize("frozen", [(), ("trained",), ("other",)])
def test_frozen_lookups_beside_trained_ones_need_no_gradient(plan, frozen, compiled):
    plain = Parts()
    opt = tw.optimize(plain, plan, sample_inputs=(torch.randn(6, 3), torch.zeros(6, 2, dtype=torch.int64), torch.rand(6, 2)))
    for name in frozen:  # after it was captured
        getattr(plain, name).requires_grad_(False)
    run = torch.compile(opt, backend="aot_eager") if compiled else opt
    for x_needs, weight_needs in ((False, False), (True, False), (False, True)):
        given = torch.randn(6, 3, requires_grad=x_needs), torch.randint(0, 50, (6, 2)), torch.rand(6, 2, requires_grad=weight_needs)
        theirs, ours = plain(*given), run(*given)
        assert [o.requires_grad for o in ours] == [o.requires_grad for o in theirs]
        for mine, wanted in zip(ours, theirs):
            torch.testing.assert_close(mine, wanted)
        with pytest.raises(RuntimeError, match="does not require grad"):
            ours[0].sum().backward()
        sum(o.sum() for o in run(*given)).backward()
        assert opt.fixed.weight.grad is None and (given[0].grad is not None) == x_needs and (given[2].grad is not None) == weight_needs


def test_a_table_frozen_later_needs_no_gradient_where_all_are_updated_in_the_backward():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Embedding(50, 4), nn.Embedding(50, 4)

        def forward(self, ids):
            return self.a(ids), self.b(ids)

    plain = Two()
    opt = tw.optimize(plain, IN_BACKWARD, sample_inputs=(torch.arange(6),))
    for frozen in (plain.a, plain.b):
        frozen.requires_grad_(False)
        assert [o.requires_grad for o in opt(torch.arange(6))] == [frozen is not plain.a, frozen is not plain.b]
        frozen.requires_grad_(True)


def test_one_optimizer_over_two_models():
    models = [Model(), Model()]
    optim = torch.optim.Adagrad([p for m in models for p in m.parameters()], lr=0.1)
    opt1, first = tw.optimize(models[0], optimizer=optim, sample_inputs=batch())
    opt2, both = tw.optimize(models[1], optimizer=first, sample_inputs=batch())
    assert opt1.report.coverage["updates"] == opt2.report.coverage["updates"] == (2, 2)
    assert len(both._row_wise_tables) == 4 and type(both) is type(first)


def test_a_table_may_change_between_forward_and_backward():
    opt = tw.optimize(Model(), sample_inputs=batch())
    out = opt(*batch())
    with torch.no_grad():
        opt.a.weight.clamp_(-0.5, 0.5)
    out.sum().backward()


def test_a_step_is_seen_by_autograd():
    model = Model()
    opt, optim = tw.optimize(model, optimizer=torch.optim.Adagrad(model.parameters()), sample_inputs=batch())
    opt(*batch()).sum().backward()
    version = opt.a.weight._version
    optim.step()
    assert opt.a.weight._version > version


def test_moving_a_model_after_an_update_in_the_backward():
    opt = tw.optimize(Model(), IN_BACKWARD, sample_inputs=batch())
    opt(*batch()).sum().backward()
    opt.double()
    assert {p.dtype for p in opt.parameters()} == {torch.float64}


def test_large_results_may_be_changed_in_place():
    table = nn.Embedding(1000, 256)
    ids = torch.arange(2048) % 1000
    opt = tw.optimize(nn.Sequential(table), sample_inputs=(ids,))
    out = opt(ids)
    assert out.numel() * 4 >= buffers.SMALLEST
    out.mul_(2).sum().backward()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_writes_into_memory_of_its_own(run_python):
    code = """
import os, torch
from tablewright.kernels.embedding import buffers
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
held = buffers.empty((1 << 19,), torch.float32).fill_(1.0)
child = os.fork()
if child == 0:
    held.zero_()
    os._exit(0)
os.waitpid(child, 0)
print(bool((held == 1.0).all()))
"""
    assert run_python(code) == "True"


def test_a_replaced_parameter_of_the_plain_model_is_refused():
    model = Model()
    opt = tw.optimize(model, sample_inputs=batch())
    model.a.weight = nn.Parameter(torch.randn(50, 16))
    with pytest.raises(tw.CaptureError, match="parameter 'a.weight' of the plain model was replaced"):
        opt(*batch())


def test_a_table_that_grew_is_refused_with_the_way_out():
    opt = tw.optimize(Model(), sample_inputs=batch())
    opt.a.weight = nn.Parameter(torch.randn(60, 16))
    with pytest.raises(ValueError, match=r"'a.weight' has shape \(60, 16\).*call it again on opt.unoptimized\(\)"):
        opt(*batch())
    assert tw.optimize(opt.unoptimized(), sample_inputs=batch())(batch()[0], torch.full((32, 2), 49)).shape == (32, 1)


def test_a_replaced_parameter_of_the_optimized_model_is_read():
    opt = tw.optimize(Model(), sample_inputs=batch())
    opt.load_state_dict({name: torch.zeros_like(p) for name, p in opt.state_dict().items()}, assign=True)
    assert not opt(*batch()).any()


def penalised(model, x, ids):
    """Gradients of a loss with a gradient penalty on the dense inputs."""
    x = x.clone().requires_grad_()
    out = model(x, ids)
    (grad,) = torch.autograd.grad(out.sigmoid().sum(), x, create_graph=True)
    (out.mean() + grad.pow(2).sum()).backward()
    return [x.grad, *(p.grad.to_dense() for p in model.parameters())]


def test_a_gradient_penalty_on_dense_inputs():
    """The inputs' gradient passes through the fused lookup, which writes the dense branch into its concatenation."""
    plain, inputs = Model(), batch()
    opt = tw.optimize(copy.deepcopy(plain), sample_inputs=batch())
    assert opt.report.coverage["lookups"] == (2, 2)
    for ours, expected in zip(penalised(opt, *inputs), penalised(plain, *inputs)):
        torch.testing.assert_close(ours, expected)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("plan", [tw.Plan(), IN_BACKWARD])
def test_second_derivatives_of_tables_are_refused_at_once(plan):
    opt = tw.optimize(Model(), plan, sample_inputs=batch())
    before, weight = opt.a.weight.detach().clone(), opt.a.weight
    with pytest.raises(RuntimeError, match="second derivatives through a fused lookup are not provided"):
        opt(*batch()).sum().backward(create_graph=True)
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="turn group_tables and pool_sequences off"):
        torch.autograd.grad(opt(*batch()).sum(), weight, create_graph=True)
    assert torch.equal(before, opt.a.weight)


def test_second_derivatives_of_tables_without_the_fused_lookup():
    plain, inputs = Model(), batch()
    opt = tw.optimize(copy.deepcopy(plain), tw.Plan(passes={"group_tables": False, "pool_sequences": False}), sample_inputs=batch())
    products = []
    for model in (opt, plain):
        weights = [model.a.weight, model.bottom.weight]
        grads = torch.autograd.grad(model(*inputs).square().sum(), weights, create_graph=True)
        products.append(torch.autograd.grad(sum(g.pow(2).sum() for g in grads), weights))
    for ours, expected in zip(*products):
        torch.testing.assert_close(ours, expected)


def test_hessian_vector_products_of_dense_weights():
    plain, x, products = nn.Sequential(nn.Linear(64, 600), nn.Tanh(), nn.Linear(600, 1)), torch.randn(50, 64), []
    opt = tw.optimize(copy.deepcopy(plain), tw.Plan(passes={"dense_chains": {"measure": False}}), sample_inputs=(x,))
    assert opt.report.coverage["mlps"] == (1, 1)
    for model in (opt, plain):
        weight = next(model.parameters())
        (grad,) = torch.autograd.grad(model(x).square().sum() + weight.pow(3).sum(), weight, create_graph=True)
        products += torch.autograd.grad(grad.pow(2).sum(), weight)
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints(use_reentrant):
    plain, inputs, grads = Model(), batch(), []
    opt = tw.optimize(copy.deepcopy(plain), sample_inputs=batch())
    for model in (opt, plain):
        x = inputs[0].clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(model, x, inputs[1], use_reentrant=use_reentrant).square().sum().backward()
        grads.append([x.grad, *(p.grad.to_dense() for p in model.parameters())])
    for ours, expected in zip(*grads):
        torch.testing.assert_close(ours, expected)
