"""Training loops that could take rows of a tiered table for others: each gives the same numbers as in memory, or an error."""
from __future__ import annotations

import copy

import pytest
import tablewright as tw
import torch
from tablewright.kernels import tiers
from tablewright.kernels.tiers import TierError
from torch import nn

pytestmark = pytest.mark.skipif(bool(tiers.available()), reason=f"NOT TESTED: {tiers.available()}")


class Twice(nn.Module):
    def __init__(self, tied=False, frozen=False):
        super().__init__()
        self.item, self.twin, self.top = nn.Embedding(1000, 8), nn.Embedding(1000, 8), nn.Linear(8, 1)
        if tied:
            self.twin.weight = self.item.weight
        self.item.weight.requires_grad_(not frozen)

    def forward(self, a, b):
        return self.top(self.item(a).sum(1) + self.item(b).sum(1) + self.twin(b).sum(1)).squeeze(1)


def _batch(k):
    generator = torch.Generator().manual_seed(k)
    return torch.randint(0, 1000, (8, 2), generator=generator), torch.randint(0, 1000, (8, 2), generator=generator)


def _two(tmp_path, cache=20_000, table=None, dense=False, optimizer=torch.optim.Adagrad, **model):
    """(model, optimizer) with the table in tiers and in memory."""
    made = []
    for storage in ({"storage": {"cache": cache, "path": str(tmp_path / "item")}}, {}):
        torch.manual_seed(0)
        plain = Twice(**model)
        params = [p for n, p in plain.named_parameters() if not dense or n != "item.weight"]
        tables = {"item": {**storage, **(table or {})}} if storage or table else {}
        plan = tw.Plan.from_dict({"version": 1, "tables": tables})
        made.append(tw.optimize(plain, plan, optimizer=optimizer(params, lr=0.1), sample_inputs=_batch(0)))
    return made


def _train(pairs, first, last):
    for opt, optimizer in pairs:
        for k in range(first, last):
            opt(*_batch(k)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def _same(pairs):
    (one, _), (other, _) = pairs
    for name, value in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name


def test_rows_of_one_call_stay_for_all_its_lookups(tmp_path):
    """Without gradients, in a cache that holds little more than one batch: the right rows, or an error."""
    pairs = _two(tmp_path, cache=2500)
    refused = 0
    with torch.no_grad():
        for k in range(200):
            try:
                assert torch.equal(pairs[0][0](*_batch(k)), pairs[1][0](*_batch(k)))
            except TierError:
                refused += 1
    assert 0 < refused < 200


def test_gradients_that_are_never_zeroed_are_refused(tmp_path):
    pairs = _two(tmp_path)
    opt, optimizer = pairs[0]
    opt(*_batch(0)).sum().backward()
    optimizer.step()
    before = opt.state_dict()
    with pytest.raises(TierError, match="still the one of the last step.*Call zero_grad"):
        opt(*_batch(1)).sum().backward()
    with pytest.raises(TierError, match="looked up before the last one.*Call zero_grad"):
        optimizer.step()
    assert all(torch.equal(v, before[n]) for n, v in opt.state_dict().items())


def test_another_optimizers_step_does_not_free_rows(tmp_path):
    pairs = _two(tmp_path, table={"embedding_optimizer": {"adagrad": {"lr": 0.1, "in_backward": False}}}, dense=True, optimizer=torch.optim.SGD)
    for opt, optimizer in pairs:
        for k in range(20):
            opt(*_batch(k)).sum().backward()
            optimizer.step()
            with torch.no_grad():
                for other in range(20):
                    opt(*_batch(1000 + 20 * k + other))
            opt.embedding_optimizer.step()
            opt.embedding_optimizer.zero_grad()
            optimizer.zero_grad()
    _same(pairs)


def test_the_optimizers_state_dict_is_whole_both_ways(tmp_path):
    pairs = _two(tmp_path)
    _train(pairs, 0, 15)
    saved = [copy.deepcopy(optimizer.state_dict()) for _, optimizer in pairs]
    for place, state in saved[1]["state"].items():
        assert torch.equal(saved[0]["state"][place]["sum"], state["sum"])
    _train(pairs, 15, 20)
    pairs[0][1].load_state_dict(saved[1])
    pairs[1][1].load_state_dict(saved[0])
    _train(pairs, 20, 50)
    _same(pairs)
    del saved[0]["state"][0]["sum"]
    with pytest.raises(RuntimeError, match="holds no 'sum' of item.weight"):
        pairs[0][1].load_state_dict(saved[0])


def test_tied_tables_are_whole_under_each_name(tmp_path):
    pairs = _two(tmp_path, tied=True)
    _train(pairs, 0, 20)
    _same(pairs)
    other = Twice(tied=True)
    pairs[0][0].load_state_dict(other.state_dict())
    assert torch.equal(pairs[0][0].state_dict()["twin.weight"], other.item.weight)


def test_a_cache_that_was_replaced_is_refused(tmp_path):
    opt, _ = _two(tmp_path)[0]
    opt.double()
    with pytest.raises(TierError, match="replaced by a tensor of torch.float64"):
        opt(*_batch(0))


def test_a_table_that_was_frozen_is_not_trained(tmp_path):
    opt, _ = _two(tmp_path, frozen=True)[0]
    opt(*_batch(0)).sum().backward()
    opt.get_parameter("item.weight").requires_grad_(True)
    with pytest.raises(TierError, match="was frozen when optimize"):
        opt(*_batch(0))
