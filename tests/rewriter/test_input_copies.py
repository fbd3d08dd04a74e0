"""Batches of tw.pipeline on their way to the model's device: the same structure and values. Nothing happens for a model on the CPU."""
from __future__ import annotations

import collections

import tablewright as tw
import torch
from tablewright.rewriter.input_copies import InputCopies
from torch import nn

Pair = collections.namedtuple("Pair", "ids lengths")


def _copies():
    made = InputCopies(nn.Linear(2, 2))
    made.device = torch.device("cpu")  # as a GPU would be
    return made


def _batch(size=3):
    ids = torch.arange(size * 4, dtype=torch.int32).reshape(size, 4)
    return {"pair": Pair(ids.t(), torch.ones(size)), "more": [ids, (torch.empty(0, dtype=torch.int64),), "name", None, 7], "same": ids}


def test_a_model_on_the_cpu_gets_its_batches_as_they_are():
    copies, batch = InputCopies(nn.Linear(2, 2)), _batch()
    assert copies.start(batch) == (batch, None) and copies.start(batch)[0] is batch


def test_structure_and_values_are_kept():
    for size in (0, 1, 3):
        batch = _batch(size)
        moved, arriving = _copies().start(batch)
        arriving.join()
        assert type(moved["pair"]) is Pair and moved["more"][2:] == ["name", None, 7] and isinstance(moved["more"][1], tuple)
        wanted, found = torch.utils._pytree.tree_leaves(batch), torch.utils._pytree.tree_leaves(moved)
        for a, b in zip(wanted, found, strict=True):
            if isinstance(a, torch.Tensor):
                assert a is not b and torch.equal(a, b) and a.dtype == b.dtype
                assert not a.numel() or b.untyped_storage().data_ptr() == moved["same"].untyped_storage().data_ptr()  # one buffer
        assert moved["same"] is moved["more"][0]  # one tensor stays one


def test_what_is_elsewhere_or_has_gradients_stays():
    batch = [torch.ones(2, device="meta"), torch.ones(2, requires_grad=True), "x"]
    moved, arriving = _copies().start(batch)
    assert moved is batch and arriving is None
    moved, _ = _copies().start([*batch, torch.ones(1)])
    assert moved[0] is batch[0] and moved[1] is batch[1] and moved[3] is not batch[2]


def test_training_through_copies_is_the_same():
    def batches():
        for k in range(8):  # ragged: every batch has its own sizes
            generator = torch.Generator().manual_seed(k)
            yield torch.randint(0, 50, (k, 3), generator=generator), torch.rand(k, 1, generator=generator)

    results = []
    for copying in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.EmbeddingBag(50, 8, mode="sum"), nn.Linear(8, 1))
        opt, optimizer = tw.optimize(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), sample_inputs=(torch.zeros(4, 3, dtype=torch.int64),))
        line = tw.pipeline(batches(), opt, inputs=lambda b: b[:1])
        if copying:
            line._copies = _copies()
        for ids, wanted in line:
            ((opt(ids) - wanted) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert bool(line.report.copied) is copying and ("in one copy a batch" in str(line.report)) is copying
        results.append(opt.state_dict())
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])
