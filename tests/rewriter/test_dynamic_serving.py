"""Exports of models with dynamic ids: the map goes along, ids without a row read the default and are counted."""
from __future__ import annotations

import numpy as np
import pytest
import tablewright as tw
import torch
from dynamic_training import PADDING, VOCABULARY, batch, made, plan, train
from tablewright.kernels import dynamic_ids, tiers
from tablewright.kernels.gather.known_ids import KnownIds
from tablewright.rewriter.serving import manifest as manifests
from torch import nn

pytestmark = pytest.mark.skipif(bool(dynamic_ids.available() or tiers.available()), reason=f"NOT TESTED: {dynamic_ids.available() or tiers.available()}")


def _answer(opt, inputs):
    opt.eval()
    with torch.no_grad():
        out = opt(*inputs)
    opt.train()
    return out.numpy()


def test_a_served_model_answers_as_the_trained_one(tmp_path):
    opt, optim = made(plan(admit_after=2, default=0.25))
    train(opt, optim, 0, 4)
    home = tmp_path / "served"
    tw.export_serving(opt, batch(0)[:3], home, shards=2, row_dtype={"words": "float16", "*": "float32"})
    assert opt.training and opt.query.training
    p = tw.load_serving(home)
    read = {"query": 0, "words": 0}
    for step in (0, 3, 9, 77):
        query, words, user, _ = batch(step)
        query[0], words[0, 0] = torch.tensor([PADDING, 12345]), -(2**63)
        got = p(query=query.numpy(), words=words.numpy(), user=user.numpy())
        np.testing.assert_allclose(got, _answer(opt, (query, words, user)), atol=2e-3, rtol=0)
        for name, ids in (("query", torch.cat([query, query])), ("words", words)):
            known = set(opt.dynamic_ids[f"{name}.weight"].export()[0].tolist())
            read[name] += sum(i not in known and not (name == "query" and i == PADDING) for i in ids.flatten().tolist())
    replayed = sum(i not in set(opt.dynamic_ids["words.weight"].export()[0].tolist()) for i in batch(0)[1].flatten().tolist())
    assert p.stats()["missing_ids"]["words"] == read["words"] + replayed and read["query"] > 8
    table = manifests.read(home).tables["query"]
    assert table.rows == opt.dynamic_ids["query.weight"].counters().rows + 2


def test_float32_rows_are_served_bit_by_bit_and_a_delta_has_ids_of_its_own(tmp_path):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.words = nn.Embedding(30, 4, padding_idx=20), nn.EmbeddingBag(5, 4, mode="mean")

        def forward(self, ids):
            return self.query(ids[:, 0]) + self.words(ids)

    model = One()
    table = {"ids": {"dynamic": True, "capacity": 50, "default": -1.0}}
    the_plan = tw.Plan.from_dict({"version": 1, "serving": {"inline_below": 10**6}, "tables": {"*": table}})
    ids = torch.tensor([[2**40, -1], [20, 2**40], [-7, 8]])
    opt, optim = tw.optimize(model, the_plan, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), sample_inputs=(ids,))
    home = tmp_path / "served"
    tw.export_serving(opt, (ids,), home)  # nothing has a row yet
    p = tw.load_serving(home)
    asked = torch.tensor([[20, -7], [-1, -1], [5, 2**40], [-(2**63), 2**63 - 1]])
    assert np.array_equal(p(ids=asked.numpy()), _answer(opt, (asked,)))
    opt(ids).sum().backward()
    optim.step()
    tw.export_serving(opt, (ids,), home)
    p.reload()
    assert np.array_equal(p(ids=asked.numpy()), _answer(opt, (asked,)))
    assert p(ids=asked.numpy())[0].tolist() != [-1.0] * 4
    given = opt.dynamic_ids["words.weight"].export()
    opt.dynamic_ids["words.weight"].load(given[0] + 1, given[1])  # the same rows for other ids
    tw.export_delta(opt, (ids,), home)
    p.reload()
    assert np.array_equal(p(ids=asked.numpy()), _answer(opt, (asked,)))


def test_what_cannot_be_served(tmp_path):
    class Staged(nn.Module):
        def __init__(self):
            super().__init__()
            self.pointer, self.query = nn.Embedding(10, 1), nn.Embedding(5, 4)

        def forward(self, ids):
            return self.query(self.pointer(ids).long().squeeze(-1))

    model = Staged()
    the_plan = tw.Plan.from_dict({"version": 1, "tables": {"query": {"ids": {"dynamic": True, "capacity": 50}}}})
    ids = torch.tensor([1, 2, 3])
    opt, _ = tw.optimize(model, the_plan, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), sample_inputs=(ids,))
    with pytest.raises(tw.ExportError, match="table 'query' has dynamic ids and cannot stay inside the graph: .*come from rows of another lookup"):
        tw.export_serving(opt, (ids,), tmp_path / "served")
    opt, _ = made()
    with pytest.raises(tw.PlanError, match="check_parity needs a plain table"):
        tw.check_parity(opt, tmp_path)


def test_any_name_of_a_table_is_served(tmp_path):
    class Files(nn.Module):
        def __init__(self):
            super().__init__()
            self.file, self.top = nn.Embedding(8, 2), nn.Linear(2, 1)  # np.savez has an argument of this name

        def forward(self, ids):
            return self.top(self.file(ids)).squeeze(-1)

    model, ids = Files(), torch.tensor([2**40, -5])
    the_plan = tw.Plan.from_dict({"version": 1, "tables": {"file": {"ids": {"dynamic": True, "capacity": 8}}}})
    opt, optimizer = tw.optimize(model, the_plan, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), sample_inputs=(ids,))
    opt(ids).sum().backward()
    optimizer.step()
    tw.export_serving(opt, (ids,), tmp_path / "served")
    served = tw.load_serving(tmp_path / "served")
    assert torch.allclose(torch.as_tensor(served(ids=ids.numpy())), opt.eval()(ids).detach(), atol=1e-6)


def test_known_ids():
    some = VOCABULARY.sort().values.numpy()
    found, unknown = KnownIds(some, None).rows(np.concatenate([some[::-1], [some[0] + 1, some[-1] - 1]]))
    assert found.tolist() == [*range(len(some) - 1, -1, -1), len(some) + 1, len(some) + 1] and unknown == 2
    found, unknown = KnownIds(some[:0], 9).rows(np.array([9, 8, -9]))
    assert found.tolist() == [0, 1, 1] and unknown == 2
