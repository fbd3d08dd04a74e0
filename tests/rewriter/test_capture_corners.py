"""Capture at its corners: shared tensors, single examples, parameter containers, abandoned traces, arrays changed in place."""

import copy

import pytest
import tablewright as tw
import torch
from capture_harness import captured
from tablewright.rewriter.capture import attach, capture, clone_shell, verify
from tablewright.rewriter.capture.check import _changed_state, derived_batches
from tablewright.rewriter.capture.program_check import kept
from test_capture_models import Offsets, Plainest
from torch import nn


def forced(args):
    """Code in forward() that only export gets past: a loop over a size."""
    for _ in range(args[0].shape[0] * 0):
        pass


@pytest.mark.parametrize("door", ["fx", "export"])
def test_one_tensor_given_twice_and_results_that_are_inputs(door):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 4)

        def forward(self, a, b):
            if door == "export":
                forced([a])
            return {"x": self.table(a) + self.table(b) * 2, "same": a, "n": 3, "none": None, "weight": self.table.weight}

    ids = torch.randint(0, 20, (5,))
    result, module, shell = captured(Twice(), (ids, ids), door=door)
    other = torch.randint(0, 20, (5,))
    assert result.guards.failure((ids, other), {}) is None
    assert not torch.equal(module(ids, other)[0], module(ids, ids)[0])


@pytest.mark.parametrize("rows", [1, 2])
def test_one_example_is_no_constant_for_export(rows):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 4)

        def forward(self, a, b):
            forced([a])
            return self.table(a).view(a.shape[0], -1) * b

    result, module, shell = captured(Model(), (torch.randint(0, 20, (rows, 3)), torch.rand(rows, 1)), door="export")
    for more in (2, 7):
        args = (torch.randint(0, 20, (more, 3)), torch.rand(more, 1))
        assert result.guards.failure(args, {}) is None
        torch.testing.assert_close(module(*args)[0], shell(*args))
    wide = (torch.randint(0, 20, (4, 3)), torch.rand(4, 12))
    assert "dimension 1 of input 'b' was 1 when captured and is 12 now" in result.guards.failure(wide, {})


PARTS = {"columns": lambda ids: ids[:, :2], "later columns": lambda ids: ids[:, 2:], "rows": lambda ids: ids[3:], "turned": lambda ids: ids.t()[:7].t()}


@pytest.mark.parametrize("part", PARTS)
def test_a_sample_that_is_part_of_a_larger_tensor_is_guarded_by_its_own_sizes(part):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 4)

        def forward(self, ids):
            forced([ids])
            return torch.cat([self.table(ids), self.table(ids)], 1).sum(1)

    batch, other = torch.randint(0, 20, (9, 7)), torch.randint(0, 20, (12, 7))
    result, module, shell = captured(Model(), (PARTS[part](batch),), door="export")
    for args in ((PARTS[part](batch),), (PARTS[part](other).clone(),)):
        assert result.guards.failure(args, {}) is None
        torch.testing.assert_close(module(*args)[0], shell(*args))


def test_changes_of_inputs_and_parts_of_results():
    class Writes(nn.Module):
        def forward(self, x, mask):
            y = x * 2
            y[:, 0] = 5.0
            y[mask] = 0.0
            x.add_(1.0)
            return y

    model = Writes()
    shell = clone_shell(model)
    x, mask = torch.rand(4, 3), torch.tensor([True, False, False, True])
    result = capture(shell, (x.clone(), mask), {})
    assert result.door == "export"
    a, b = x.clone(), x.clone()
    torch.testing.assert_close(attach(shell, result.graph)(a, mask)[0], model(b, mask))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, x + 1)


def test_parameter_containers_and_plain_tensors():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])
            self.named = nn.ParameterDict({"bias": nn.Parameter(torch.randn(4))})
            self.scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
            self.register_buffer("shift", torch.randn(4), persistent=False)

        def forward(self, x):
            for row in self.rows:
                x = x * row
            return (x + self.named["bias"]) * self.scale + self.shift

    model = Holds()
    result, module, shell = captured(model, (torch.rand(3, 4),), door="fx")
    assert {node.target for node in result.graph.nodes if node.op == "get_attr"} == {
        "rows.0", "rows.1", "named.bias", "scale", "shift"}
    model.scale = torch.zeros(4)
    assert "attribute 'scale'" in result.guards.failure((torch.rand(3, 4),), {})


def test_abandoned_traces_leave_nothing_behind():
    class Late(nn.Module):
        def forward(self, x):
            y = x + torch.tensor([1.0, 2.0])
            forced([x])
            return y

    shell = clone_shell(Late())
    result = capture(shell, (torch.rand(3, 2),), {})
    assert result.door == "export"
    assert [name for name in shell.__dict__ if "constant" in name] == ["_tablewright_constant_0"]
    assert not shell.state_dict()


def test_verify_compares_a_graph_captured_without_inputs():
    model = Plainest()
    shell = clone_shell(model)
    result = capture(shell, None)
    assert verify(shell, result, (torch.randint(0, 20, (5, 3)), torch.randint(0, 20, (5,)))) is None
    add = next(node for node in result.graph.nodes if str(node.target) == "aten.linear.default")
    add.args = (add.args[0], add.args[1])  # the bias is lost
    assert "differs by up to" in verify(shell, result, (torch.randint(0, 20, (5, 3)), torch.randint(0, 20, (5,))))


def test_arrays_changed_in_place():
    model, args = Offsets(), (torch.randint(0, 20, (5, 3)),)
    result, _, _ = captured(model, args, door="fx")
    model.offsets[0] = 1
    assert "the array in attribute 'offsets' of 'the model' was changed" in result.guards.failure(args, {})


def _sum_in(how):
    def forward(self, ids):
        rows = self.table(ids)
        total = how(rows)
        for each in (rows, rows * 2):
            total += each.norm()
        total /= ids.shape[0]
        return total

    return forward


def _held(rows):
    zeros = torch.zeros(1)
    _held.kept = zeros  # Python can look at it
    return zeros.to(rows.device)


MADE = {
    "of a loss, moved to the device": (lambda rows: torch.zeros(1).to(rows.device), "fx"),
    "like another": (lambda rows: torch.zeros(1).type_as(rows), "fx"),
    "from values": (lambda rows: torch.tensor([0.0, 1.0]).to(rows), "fx"),
    "by several names": (lambda rows: torch.zeros(2).contiguous().to(rows.device).reshape(2), "fx"),
    "as it is": (lambda rows: torch.zeros(1), "export"),
    "a view": (lambda rows: torch.zeros(1, 2).view(2).to(rows.device), "export"),
    "held by somebody": (_held, "export"),
}


@pytest.mark.parametrize("made", MADE)
def test_a_tensor_that_forward_makes_and_changes_is_made_anew_at_every_call(made):
    how, door = MADE[made]

    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 4)

        forward = _sum_in(how)

    ids = torch.randint(0, 20, (5,))
    _, module, _ = captured(Sums(), (ids,), door=door)
    first, second = (module(ids)[0].clone() for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("how", ["data", "grad"])
def test_tensors_that_forward_gives_other_data_or_gradients_get_them_at_every_call(how):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(20, 4), nn.Linear(4, 1)

        def forward(self, ids):
            weight = self.table.weight
            if how == "data":  # as models do that keep their rows at one length
                weight.data = weight.data / weight.data.norm(dim=1, keepdim=True) * 2 + 0.1
            else:
                weight.grad = None
            return self.out(self.table(ids)).sum(1)

    torch.manual_seed(0)
    plain = Model()
    model, ids = copy.deepcopy(plain), torch.randint(0, 20, (8,))
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1)
    opt, ours = tw.optimize(model, "auto", optimizer=torch.optim.SGD(model.parameters(), lr=0.1), sample_inputs=(ids,))
    for _ in range(3):
        for net, optimizer in ((plain, theirs), (opt, ours)):
            net(ids).sum().backward()
            optimizer.step()  # without zero_grad: what forward does to gradients counts
        torch.testing.assert_close(opt.state_dict(), plain.state_dict())


def test_a_sparse_parameter_is_put_back_and_sparse_inputs_have_no_other_batches():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.graph = nn.Parameter(torch.eye(6).to_sparse(), requires_grad=False)

    model = Model()
    with kept(model):
        model.graph.data = (torch.eye(6) * 2).to_sparse()
    assert torch.equal(model.graph.detach().to_dense(), torch.eye(6))
    assert derived_batches(None, (torch.eye(6).to_sparse(), torch.arange(6)), {}) == []


@pytest.mark.parametrize("how", ["scaled", "row"])
def test_weights_that_forward_changes_under_no_grad_are_put_back_after_the_capture(how):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 4)

        def forward(self, ids):
            with torch.no_grad():
                if how == "scaled":
                    self.table.weight.mul_(2.0)
                else:
                    self.table.weight[0] = 0
            return self.table(ids)

    model, ids = Model(), torch.arange(5)
    plain = copy.deepcopy(model)
    opt = tw.optimize(model, "auto", sample_inputs=(ids,))
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    for _ in range(2):
        torch.testing.assert_close(opt(ids), plain(ids))


def test_weights_that_forward_only_reads_under_no_grad_are_not_copied_for_that():
    """They may be larger than what is left of the memory."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.written = nn.Embedding(20, 4), nn.Embedding(20, 4)

        def forward(self, ids):
            forced([ids])
            with torch.no_grad():
                self.written.weight[0] = 0
                target = self.read(ids)
            return self.written(ids) - target

    result, _, shell = captured(Model(), (torch.arange(5),), door="export")
    assert _changed_state(shell, result.graph) == {"written.weight"}
