"""Models whose tables lie in tiers: the same training bit for bit, whole state dicts, snapshots that survive kill -9."""
from __future__ import annotations

import copy
import json

import pytest
import tablewright as tw
import torch
from tablewright.kernels import tiers
from tablewright.kernels.tiers import Part, TierError
from tablewright.rewriter.errors import PlanError
from tier_training import Model, after_kills, batch, model_in, train
from torch import nn

pytestmark = pytest.mark.skipif(bool(tiers.available()), reason=f"NOT TESTED: {tiers.available()}")


def _plan(folder, storage=None, **more):
    return tw.Plan.from_dict({"version": 1, "tables": {"item": {"storage": {"cache": 30_000, "path": str(folder / "item"), **(storage or {})}}}, **more})


def _same(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


USERS = {
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.2),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
}


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_the_users_optimizer_trains_the_same(tmp_path, name, policy):
    torch.manual_seed(0)
    numerics = "approximate" if name == "adam" else "reassociated"
    models = Model(), Model()
    models[1].load_state_dict(models[0].state_dict())
    pairs = []
    for model, plan in zip(models, (_plan(tmp_path, {"policy": policy}, numerics=numerics), tw.Plan(numerics=numerics))):
        pairs.append(tw.optimize(model, plan, optimizer=USERS[name](model.parameters()), sample_inputs=batch(0)[:2]))
    for opt, optimizer in pairs:
        train(opt, optimizer, 0, 40)
    _same(pairs[0][0], pairs[1][0])
    found = pairs[0][0].tiers["item.weight"]
    assert found.written and found.read and found.hits and not found.batches
    assert torch.equal(pairs[0][0](*batch(99)[:2]), pairs[1][0](*batch(99)[:2]))


@pytest.mark.parametrize("inside", [True, False], ids=["in_backward", "step"])
@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_the_plans_optimizer_trains_the_same(tmp_path, kind, inside):
    torch.manual_seed(0)
    models = Model(), Model()
    models[1].load_state_dict(models[0].state_dict())
    opts = []
    for model, more in zip(models, ({"storage": {"cache": 30_000, "path": str(tmp_path / "item")}}, {})):
        tables = {"item": {"embedding_optimizer": {kind: {"lr": 0.1, "in_backward": inside}}, **more}}
        opts.append(tw.optimize(model, tw.Plan.from_dict({"version": 1, "tables": tables}), sample_inputs=batch(0)[:2]))
    for step in range(40):
        for opt in opts:
            items, users, wanted = batch(step)
            ((opt(items, users) - wanted) ** 2).mean().backward()
            if not inside:
                opt.embedding_optimizer.step()
            opt.zero_grad()
    _same(*opts)
    assert opts[0].tiers["item.weight"].written


def test_state_dicts_are_whole_both_ways(tmp_path):
    opt, optimizer = model_in(tmp_path)
    train(opt, optimizer, 0, 20)
    plain = Model()
    plain.load_state_dict(opt.state_dict())
    assert torch.equal(opt.unoptimized()(*batch(7)[:2]), opt(*batch(7)[:2])) and type(opt.unoptimized()) is Model
    assert torch.equal(plain(*batch(7)[:2]), opt(*batch(7)[:2]))
    other = Model()
    opt.load_state_dict(other.state_dict())
    assert torch.equal(other(*batch(7)[:2]), opt(*batch(7)[:2]))
    _same(opt, other)
    with pytest.raises(RuntimeError, match="size mismatch for item.weight"):
        opt.load_state_dict({**other.state_dict(), "item.weight": torch.zeros(7, 8)})


def test_snapshot_and_resume_go_on_as_if_nothing_had_happened(tmp_path):
    opt, optimizer = model_in(tmp_path)
    train(opt, optimizer, 0, 12)
    opt.snapshot(tmp_path / "kept", optimizer)
    train(opt, optimizer, 12, 20)  # lost
    opt._tiered.open["item.weight"].cache.close()
    again, optimizer = model_in(tmp_path, resume=True)
    train(again, optimizer, 12, 24)
    (tmp_path / "other").mkdir()
    straight, optimizer = model_in(tmp_path / "other")
    train(straight, optimizer, 0, 24)
    _same(again, straight)


def test_kill_at_any_moment(tmp_path):
    """Every snapshot is complete or absent: weights, state and dense part are of one step."""
    for opt, optimizer, steps, straight, other in after_kills(tmp_path, 2, seed=0):
        assert steps == 3 * opt.tiers["item.weight"].generation
        _same(opt, straight)
        assert torch.equal(optimizer.state[opt.top.weight]["sum"], other.state[straight.top.weight]["sum"])


def test_a_snapshot_that_one_table_finished_and_the_manifest_did_not_is_dropped(tmp_path):
    opt, optimizer = model_in(tmp_path)
    train(opt, optimizer, 0, 6)
    opt.snapshot(tmp_path / "kept", optimizer)
    kept = copy.deepcopy(opt.state_dict())
    train(opt, optimizer, 6, 9)
    opt._tiered.open["item.weight"].cache.prepare()  # and then the process dies
    opt._tiered.open["item.weight"].cache.close()
    again, _ = model_in(tmp_path, resume=True)
    assert all(torch.equal(kept[n], v) for n, v in again.state_dict().items())


def test_a_table_on_the_meta_device_starts_from_its_seed(tmp_path):
    torch.manual_seed(0)
    model = Model(device="meta", rows=2**31)
    plan = _plan(tmp_path, {"init": {"uniform": [-0.1, 0.1]}, "seed": 5})
    opt, optimizer = tw.optimize(model, plan, optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1), sample_inputs=batch(0, 2**31)[:2])
    items, users, wanted = batch(1, 2**31)
    items[0, 0], items[1, 0] = 3, 2**31 - 1
    expected = Part(8, "uniform", -0.1, 0.1).rows(0, 5, items.flatten()).view(32, 2, 8)
    expected[items == 3] = 0  # the padding row, as nn.Embedding starts it
    out = opt.top(torch.cat([expected.flatten(1), opt.user(users)], 1)).squeeze(1)
    torch.testing.assert_close(opt(items, users), out)
    train_on = ((opt(items, users) - wanted) ** 2).mean()
    train_on.backward()
    optimizer.step()
    assert not torch.equal(opt(items, users), out)
    assert sum(f.stat().st_blocks * 512 for f in (tmp_path / "item").iterdir()) < 2**22
    with pytest.raises(TierError, match="state_dict.. cannot hold it.*snapshot"):
        opt.state_dict()


def test_what_waits_for_its_update_stays(tmp_path):
    """Gradients hold slots: rows of several forwards of one step may not leave before it."""
    models = [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    pairs = [
        tw.optimize(m, p, optimizer=torch.optim.SGD(m.parameters(), lr=0.1), sample_inputs=batch(0)[:2])
        for m, p in zip(models, (_plan(tmp_path, {"cache": 12_000}), tw.Plan()))
    ]
    for step in range(0, 24, 3):
        for opt, optimizer in pairs:
            for k in range(3):
                items, users, wanted = batch(step + k)
                ((opt(items, users) - wanted) ** 2).mean().backward()
            with torch.no_grad():
                opt(*batch(step + 100)[:2])
            optimizer.step()
            optimizer.zero_grad()
    _same(pairs[0][0], pairs[1][0])
    opt = pairs[0][0]
    with pytest.raises(TierError, match="table 'item.weight': the cache is too small.*call the optimizer's step"):
        for step in range(100):
            opt(*batch(step)[:2])
    pairs[0][1].step()
    before = opt.tiers["item.weight"]
    with torch.no_grad():
        for step in range(100):
            opt(*batch(step)[:2])
    assert opt.tiers["item.weight"].batches <= 1 and opt.tiers["item.weight"].misses > before.misses


def test_evaluation_changes_nothing(tmp_path):
    opt, optimizer = model_in(tmp_path)
    train(opt, optimizer, 0, 6)
    opt.snapshot(tmp_path / "kept", optimizer)
    opt.eval()
    with torch.no_grad():
        for step in range(50, 80):
            opt(*batch(step)[:2])
    assert opt.tiers["item.weight"].journal == 0


def test_ids_are_checked_and_counted_from_the_end(tmp_path):
    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.item = nn.Embedding(1000, 4)

        def forward(self, ids):
            return self.item.weight[ids]

    model, ids = Indexed(), torch.tensor([0, 5, -1, -1000])
    plain = copy.deepcopy(model)
    opt, _ = tw.optimize(model, _plan(tmp_path), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), sample_inputs=(ids,))
    assert opt.report.coverage["tiers"] == (1, 1) and torch.equal(opt(ids), plain(ids))
    with pytest.raises(IndexError, match="id 1000 is out of range for table 'item.weight' of 1000 rows"):
        opt(torch.tensor([1, 1000]))


def test_recaptured_forms_read_the_same_cache(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.item, self.top = nn.Embedding(1000, 8), nn.Linear(8, 1)

        def forward(self, ids, scale=None):
            x = self.top(self.item(ids))
            return x if scale is None else x * scale

    model, ids = Two(), torch.randint(0, 1000, (16,))
    plain = copy.deepcopy(model)
    opt, optimizer = tw.optimize(model, _plan(tmp_path), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), sample_inputs=(ids,))
    assert torch.equal(opt(ids), plain(ids)) and torch.equal(opt(ids, torch.tensor(2.0)), plain(ids, torch.tensor(2.0)))
    opt(ids, torch.tensor(2.0)).sum().backward()
    optimizer.step()
    assert not torch.equal(opt(ids), plain(ids)) and opt.tiers["item.weight"].batches <= 1


def test_refusals(tmp_path):
    model = Model()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    inputs = batch(0)[:2]

    def refused(words, plan, optimizer=optimizer, model=model):
        with pytest.raises(PlanError, match=words):
            tw.optimize(model, plan, optimizer=optimizer, sample_inputs=inputs)

    refused("nobody updates it row by row: no optimizer was given", _plan(tmp_path), optimizer=None)
    refused("Adam moves rows that were not looked up", _plan(tmp_path), optimizer=torch.optim.Adam(model.parameters()))
    refused("16 rows with their optimizer state take 1024", _plan(tmp_path, {"cache": 1000}))
    refused("float64", _plan(tmp_path), model=(double := Model().double()), optimizer=torch.optim.Adagrad(double.parameters()))

    class Whole(Model):
        def forward(self, items, users):
            return super().forward(items, users) + self.item.weight.sum()

    class Numpy(Model):
        def forward(self, items, users):
            out = super().forward(items, users)
            return out + torch.from_numpy(out.detach().numpy() * 0)

    through_numpy = Numpy()
    refused("needs forward.. as one graph", _plan(tmp_path / "cut"), model=through_numpy, optimizer=torch.optim.SGD(through_numpy.parameters(), lr=1.0))
    whole = Whole()
    refused("reads it as a whole", _plan(tmp_path / "whole"), model=whole, optimizer=torch.optim.SGD(whole.parameters(), lr=1.0))
    opt, optimizer = tw.optimize(model, _plan(tmp_path / "a"), optimizer=optimizer, sample_inputs=inputs)
    train(opt, optimizer, 0, 2)
    opt.snapshot(tmp_path / "kept", optimizer)
    for call in (lambda: copy.deepcopy(opt), lambda: torch.save(opt, tmp_path / "x.pt"), lambda: opt.check(*inputs), lambda: opt.bisect(*inputs)):
        with pytest.raises(PlanError, match="the plan keeps item.weight in tiers"):
            call()
    opt._tiered.open["item.weight"].cache.close()
    other = Model()
    given = torch.optim.Adagrad(other.parameters(), lr=0.1)
    refused("holds a snapshot of an earlier run", _plan(tmp_path / "a"), model=other, optimizer=given)
    refused("holds no snapshot of a model", _plan(tmp_path / "a", {"resume": str(tmp_path / "nothing")}), model=other, optimizer=given)
    refused("the snapshot in .* is of item.weight in", _plan(tmp_path / "b", {"resume": str(tmp_path / "kept")}), model=other, optimizer=given)
    said = json.loads((tmp_path / "kept" / "snapshot.json").read_text())
    said["tables"]["item.weight"]["generation"] = 7
    (tmp_path / "kept" / "snapshot.json").write_text(json.dumps(said))
    refused("is at snapshot 1, and .* wants 7", _plan(tmp_path / "a", {"resume": str(tmp_path / "kept")}), model=other, optimizer=given)
    with pytest.raises(RuntimeError, match="the plan gives none storage"):
        tw.optimize(Model()).snapshot(tmp_path)


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ({"cache": "4 lightyears", "path": "x"}, "storage.cache is '4 lightyears'"), ({"path": "x"}, "says no cache"), ({"cache": 1}, "says no path"),
        ({"cache": "1GB", "path": "x", "cach_on": "host"}, "no key 'cach_on'.*cache_on"), ({"cache": "1GB", "path": "x", "cache_on": "tpu"}, "cache_on: tpu.*host | cuda | cpu"),
        ({"cache": "1GB", "path": "x", "policy": "fifo"}, "lru | lfu"), ({"cache": "1GB", "path": "x", "init": {"xavier": 1}}, "storage.init"), (3, "must be a mapping"),
    ],
)  # fmt: skip
def test_bad_plans(storage, words):
    with pytest.raises(PlanError, match=words):
        tw.Plan.from_dict({"version": 1, "tables": {"item": {"storage": storage}}})


def test_plans_round_trip(tmp_path):
    plan = _plan(tmp_path, {"policy": "lfu", "init": {"normal": [0, 0.5]}, "seed": 3, "cache": "1.5GiB"})
    plan.save(tmp_path / "plan.yaml")
    assert tw.Plan.load(tmp_path / "plan.yaml") == plan and plan.tables["item"].storage.cache == 3 * 2**29
