"""Two features at once: pairs that each work alone and could go wrong together. Most were found by random models."""
from __future__ import annotations

import copy
import warnings

import pytest
import random_loops
import tablewright as tw
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def module(forward, **parts) -> nn.Module:
    """A float64 module with ``parts`` (modules, parameters; tensors become buffers) and this ``forward(self, ...)``."""
    result = type("Plain", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
            result.register_buffer(name, part)
        else:
            setattr(result, name, part)
    return result.double()


def tied(kind: type, first: nn.Module, **options) -> nn.Module:
    """A second lookup module over ``first``'s table."""
    second = kind(*first.weight.shape, **options)
    second.weight = first.weight
    return second


def adagrad(params):
    return torch.optim.Adagrad(params, lr=0.1)


def same(model: nn.Module, *batches: tuple, fused: tuple[int, int] | None = None, optimizer=adagrad, forwards: int = 1, **options):
    """Train a plain copy and the optimized model on ``batches``; all must agree. Returns the optimized model."""
    torch.manual_seed(0)
    plain = copy.deepcopy(model)
    theirs = optimizer(plain.parameters())
    opt, mine = tw.optimize(model, optimizer=optimizer(model.parameters()), sample_inputs=batches[0], **options)
    if fused is not None:
        assert opt.report.coverage["lookups"] == fused, opt.report
    for step, batch in enumerate(batches * (2 if len(batches) < 3 else 1)):
        losses = []
        for each in (plain, opt):
            torch.manual_seed(step)
            results = [each(*batch) for _ in range(forwards)]
            losses.append((results, sum(random_loops.total(r) for r in results)))
        random_loops.compare_outputs(f"step {step}", losses[0][0], losses[1][0])
        for _, loss in losses:
            loss.backward()
        random_loops.compare_models(f"step {step}, backward", plain, opt)
        for each in (theirs, mine):
            each.step()
            each.zero_grad()
        random_loops.compare_models(f"step {step}", plain, opt)
        random_loops.compare_optimizers(f"step {step}", theirs, mine)
    return opt


def planned(model: nn.Module, *batches: tuple, forwards: int = 1, change=lambda m: None):
    """Train with a plan's AdaGrad inside the backward, and by ``torch.optim.Adagrad`` on a plain copy. Returns the model."""
    plain = copy.deepcopy(model)
    theirs = torch.optim.Adagrad(plain.parameters(), lr=0.1)
    plan = tw.Plan(embedding_optimizer=tw.Adagrad(lr=0.1, in_backward=True))
    opt = tw.optimize(model, plan, sample_inputs=batches[0])
    dense = list(opt.dense_parameters())
    mine = torch.optim.Adagrad(dense, lr=0.1) if dense else None
    for each in (plain, opt):
        change(each)
    for step, batch in enumerate(batches * 2):
        for each in (plain, opt):
            sum(random_loops.total(each(*batch)) for _ in range(forwards)).backward()
        for each in filter(None, (theirs, mine)):
            each.step()
        for each in (plain, opt):
            each.zero_grad()
        for name, param in plain.named_parameters():
            random_loops.close(f"step {step}, {name}", param, opt.get_parameter(name))
    return opt


def ids(*values) -> Tensor:
    return torch.tensor(values)


# --- ties ------------------------------------------------------------------------------------------------------------------------


def test_tied_and_padded_differently():
    first = nn.Embedding(6, 4, padding_idx=0)
    model = module(
        lambda self, a, b, c: torch.cat([self.a(a), self.b(b).sum(1), self.c(c)], 1),
        a=first, b=tied(nn.Embedding, first, padding_idx=-1), c=tied(nn.EmbeddingBag, first, padding_idx=2, mode="mean"),
    )  # fmt: skip
    same(model, (ids(0, 5, 2), ids([0, 5], [5, 5], [2, 0]), ids([2, 2], [2, 0], [5, 1])), fused=(3, 3))


def test_tied_and_one_of_them_with_max_norm():
    """The renorm writes the table under the other module's name: the plain lookup may not be moved across it."""
    first = nn.Embedding(6, 4)
    model = module(lambda self, a, b: (self.a(a), self.b(b)), a=first, b=tied(nn.Embedding, first, max_norm=0.5))
    same(model, (ids(0, 1), ids(1, 2)), fused=(0, 2))


def test_tied_sparse_and_dense_and_linear():
    first = nn.Embedding(6, 4, sparse=True)

    def forward(self, a, b):
        return F.linear(torch.cat([self.a(a), self.b(b)], 1).view(-1, 2, 4).sum(1), self.a.weight)

    same(module(forward, a=first, b=tied(nn.EmbeddingBag, first, mode="sum")), (ids(0, 1, 1), ids([1], [2], [2])), fused=(2, 2))


def test_tied_and_updated_in_the_backward():
    first = nn.Embedding(6, 4)
    model = module(
        lambda self, a, b: self.top(torch.cat([self.a(a), self.b(b)], 1)),
        a=first, b=tied(nn.EmbeddingBag, first, mode="sum"), top=nn.Linear(8, 1),
    )  # fmt: skip
    planned(model, (ids(0, 1, 1), ids([1, 1], [2, 0], [2, 5])))


def test_two_forwards_and_updated_in_the_backward():
    model = module(lambda self, a: self.top(self.a(a)), a=nn.Embedding(6, 4), top=nn.Linear(4, 1))
    planned(model, (ids(0, 1, 1),), forwards=2)


def test_updated_in_the_backward_and_frozen_afterwards():
    model = module(
        lambda self, a, b: self.top(torch.cat([self.a(a), self.b(b)], 1)),
        a=nn.Embedding(6, 4), b=nn.Embedding(6, 4), top=nn.Linear(8, 1),
    )  # fmt: skip
    planned(model, (ids(0, 1), ids(1, 2)), change=lambda m: m.get_parameter("a.weight").requires_grad_(False))


def test_updated_in_the_backward_and_an_empty_batch():
    model = module(lambda self, a: self.top(self.a(a)), a=nn.Embedding(6, 4), top=nn.Linear(4, 1))
    planned(model, (ids(0, 1),), (torch.empty(0, dtype=torch.int64),), (ids(3),))


# --- bags ------------------------------------------------------------------------------------------------------------------------


def test_mean_and_sample_weights_raise_as_the_plain_model_does():
    model = module(lambda self, a, w: self.a(a, per_sample_weights=w), a=nn.EmbeddingBag(6, 4, mode="mean"))
    batch = (ids([1, 2]), torch.ones(1, 2, dtype=torch.float64))
    with pytest.raises(NotImplementedError, match="per_sample_weights"):
        model(*batch)
    with pytest.raises(tw.CaptureError, match="per_sample_weights"):
        tw.optimize(model, sample_inputs=batch)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_padding_and_empty_bags(mode, last):
    """Bags that are empty, and bags of nothing but padding; both are zero and train nothing."""
    model = module(lambda self, a, o: self.a(a, o), a=nn.EmbeddingBag(6, 4, mode=mode, padding_idx=2, include_last_offset=last))
    offsets = [0, 0, 2, 5] + [7] * last
    same(model, (ids(2, 2, 1, 2, 5, 2, 2), ids(*offsets)), fused=(1, 1))


def test_jagged_and_stacked_with_plain_lookups_and_dense():
    model = module(
        lambda self, x, a, b, o: torch.stack([self.a(a), x, self.b(b, o)], 1).flatten(1),
        a=nn.Embedding(6, 4), b=nn.EmbeddingBag(6, 4, mode="mean"),
    )  # fmt: skip
    x = torch.randn(3, 4, dtype=torch.float64)
    same(model, (x, ids(0, 1, 1), ids(1, 2, 2, 5), ids(0, 0, 3)), fused=(2, 2))


def test_sample_weights_that_are_another_lookup():
    """The weights' lookup is fused first; the bag must then read the fused result, not the plain lookup it replaced."""
    model = module(
        lambda self, a, b: self.a(a, per_sample_weights=self.w(b)), a=nn.EmbeddingBag(6, 4, mode="sum"), w=nn.Embedding(5, 3)
    )  # fmt: skip
    opt = same(model, (ids([1, 2, 2], [0, 5, 1]), ids(4, 0)), fused=(2, 2))
    assert "aten.embedding" not in opt.code() and opt.report.coverage["updates"] == (2, 2)


@pytest.mark.parametrize("size", [0, 1])
def test_all_forms_and_a_tiny_batch(size):
    def forward(self, a, b, c, o):
        return torch.cat([self.a(a), self.b(b), self.b(c, o), self.a.weight[a - 1]], 1)

    model = module(forward, a=nn.Embedding(6, 4, padding_idx=1), b=nn.EmbeddingBag(6, 4, mode="mean"))
    big = (ids(0, 1, 1), ids([1, 1], [2, 0], [2, 5]), ids(1, 2), ids(0, 0, 1))
    tiny = (big[0][:size], big[1][:size], big[2] if size else big[2][:0], big[3][:size])
    same(model, big, tiny, big, fused=(4, 4))


# --- joins -----------------------------------------------------------------------------------------------------------------------


def test_a_join_in_part_and_lookups_outside_of_it():
    """The cat takes a run of two lookups as one slot; the two others it reads must come from the launch as well."""
    def forward(self, a, b, c, d):
        return torch.cat([self.a(a), self.b(b)[:, -1], self.c(c), self.c(d)], 1)

    model = module(forward, a=nn.Embedding(6, 4), b=nn.Embedding(6, 4), c=nn.EmbeddingBag(6, 2, mode="sum"))
    opt = same(model, (ids(0, 1), ids([1, 2], [0, 0]), ids([1], [2]), ids([5], [5])), fused=(4, 4))
    assert "aten.embedding" not in opt.code() and opt.report.coverage["updates"] == (3, 3)


@pytest.mark.parametrize("write", ["z.view(-1).mul_(2.0)", "z.add_(1.0)", "a.view(-1).mul_(2.0)", "z[:, :4].mul_(3.0)"])
def test_a_join_and_a_write_into_it(write):
    """What is written into the join does not reach the lookups, and the other way round."""
    space: dict = {"torch": torch}
    exec(
        f"def forward(self, x, y):\n    a, b = self.a(x), self.b(y)\n    z = torch.cat([a, b], 1)\n    {write}\n"
        "    return z, a * 2, b.sin()", space,
    )  # fmt: skip
    same(module(space["forward"], a=nn.Embedding(6, 4), b=nn.Embedding(6, 4)), (ids(0, 1), ids(2, 5)))


def test_a_join_and_a_lookup_given_to_the_caller():
    """The caller owns what it gets: writing to it disturbs neither the other outputs nor the backward."""
    def forward(self, x, y):
        a, b = self.a(x), self.b(y)
        return self.top(torch.cat([a, b], 1)), a

    model = module(forward, a=nn.Embedding(6, 4), b=nn.Embedding(6, 4), top=nn.Linear(8, 1))
    plain = copy.deepcopy(model)
    opt = tw.optimize(model, sample_inputs=(ids(0, 1), ids(2, 5)))
    for each in (plain, opt):
        y, a = each(ids(0, 1), ids(2, 5))
        a.mul_(0.0)
        (y.sum() + a.sum()).backward()
    random_loops.compare_models("after a write", plain, opt)


def test_a_wider_dense_input_and_half_tables():
    model = module(lambda self, x, a, b: torch.cat([self.a(a), x, self.b(b)], 1), a=nn.Embedding(6, 4), b=nn.Embedding(6, 2))
    model.bfloat16()
    x = torch.randn(2, 3, dtype=torch.float32)
    opt = same(model, (x, ids(0, 1), ids(2, 5)), fused=(2, 2), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert opt(x, ids(0, 1), ids(2, 5))[:, 4:7].equal(x)


# --- order -----------------------------------------------------------------------------------------------------------------------


def test_ids_from_a_buffer_that_the_forward_changes():
    """The second lookup's ids are computed after the write; they may not be made before it."""
    def forward(self, x):
        a = self.a(x) * 2
        self.shift.add_(1)
        return a + self.b((x + self.shift) % 6)

    model = module(forward, a=nn.Embedding(6, 4), b=nn.Embedding(6, 4), shift=torch.tensor(0))
    model.shift = model.shift.long()
    same(model, (ids(0, 1, 5),))


def test_dropout_between_lookups_draws_the_same_numbers():
    def forward(self, x, y):
        a = F.dropout(self.a(x), 0.4, self.training)
        return torch.cat([a, F.dropout(self.b(y), 0.4, self.training)], 1)

    same(module(forward, a=nn.Embedding(6, 4), b=nn.Embedding(6, 4)), (ids(0, 1, 5), ids(1, 2, 2)), fused=(2, 2))


# --- loops -----------------------------------------------------------------------------------------------------------------------


def test_row_wise_and_a_scheduler_built_before():
    model = module(lambda self, a: self.a(a), a=nn.Embedding(6, 4))
    user = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(user, 1, 0.5)
    opt, optim = tw.optimize(model, optimizer=user, sample_inputs=(ids(0, 1),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rate in (1.0, 0.5, 0.25):
            before = model.a.weight.detach().clone()
            opt(ids(0, 1)).sum().backward()
            optim.step()
            scheduler.step()
            optim.zero_grad()
            assert torch.allclose(before[:2] - model.a.weight[:2], torch.full((2, 4), rate, dtype=torch.float64))


@pytest.mark.parametrize("loads", ["user", "returned"])
def test_row_wise_and_a_state_loaded_into_either(loads):
    """One state: what is loaded into the user's optimizer is what the returned one goes on with, and the other way round."""
    model = module(lambda self, a: self.a(a), a=nn.Embedding(6, 4))
    user = torch.optim.Adagrad(model.parameters(), lr=0.1)
    opt, optim = tw.optimize(model, optimizer=user, sample_inputs=(ids(0, 1),))
    state = copy.deepcopy(user.state_dict())
    state["state"][0]["sum"] += 8.0
    state["param_groups"][0]["lr"] = 0.3
    (user if loads == "user" else optim).load_state_dict(state)
    for each in (user, optim):
        assert each.param_groups[0]["lr"] == 0.3 and each.state[model.a.weight]["sum"].min() == 8.0
    before = model.a.weight.detach().clone()
    opt(ids(0, 1)).sum().backward()
    optim.step()
    assert torch.allclose(before[:2] - model.a.weight[:2], torch.full((2, 4), 0.3 / 3, dtype=torch.float64))


def test_plain_sgd_keeps_no_state():
    model = module(lambda self, a: self.a(a), a=nn.Embedding(6, 4))
    opt, optim = tw.optimize(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), sample_inputs=(ids(0, 1),))
    opt(ids(0, 1)).sum().backward()
    optim.step()
    assert optim.state_dict()["state"] == {}


def test_half_tables_and_two_forwards():
    """torch adds no sparse fp16 gradients on CPU, so those tables keep their dense ones."""
    model = module(lambda self, a: self.a(a), a=nn.Embedding(6, 4)).half()
    same(model, (ids(0, 1),), forwards=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))


def test_exported_and_a_size_of_one_that_grows():
    """torch.export takes a size of one for a constant: another size needs another graph."""
    model = module(lambda self, a: self.a(a), a=nn.EmbeddingBag(6, 4, mode="mean", max_norm=0.5))
    opt = tw.optimize(_Stubborn(model), sample_inputs=(ids([1], [2], [2]),))
    assert opt.report.door == "export"
    for batch in (ids([1], [2]), ids([1, 2, 3], [2, 5, 5]), ids([4])):
        assert opt(batch).equal(opt.unoptimized()(batch))


class _Stubborn(nn.Module):
    """What the first door does not take: it looks at a method of a result."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch):
        made = self.inner(batch)
        return made.tolist and made
