"""Tables with their cache on a device, whose slots are on the CPU here: the same training bit for bit, however late rows arrive."""
from __future__ import annotations

import copy
import sys
import threading
import time
from pathlib import Path

import pytest
import tablewright as tw
import torch
from tablewright.kernels import tiers
from tablewright.kernels.tiers import Part, TierError, device
from tablewright.rewriter.errors import PlanError
from tier_training import Model, after_kills, batch, model_in, train
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))
from late_moves import LateMoves  # noqa: E402

pytestmark = pytest.mark.skipif(bool(tiers.available()), reason=f"NOT TESTED: {tiers.available()}")
HOST = {"cache_on": "cpu", "backing": "host"}
USERS = {
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.2),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
}


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def late(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(device, "SlotMoves", LateMoves)


def _storage(folder, backing="host", **more):
    return {"cache": 30_000, "cache_on": "cpu", "backing": backing, **({"path": str(folder / "item")} if backing == "ssd" else {}), **more}


def _pair(storage, optimizer="adagrad", make=Model, sample=None, table=None):
    """(model, optimizer) with the table's cache on a device, and in memory."""
    made = []
    for more in ({"storage": storage}, {}):
        torch.manual_seed(0)
        model = make()
        tables = {"item": {**more, **(table or {})}}
        plan = tw.Plan.from_dict({"version": 1, "numerics": "approximate" if optimizer == "adam" else "reassociated", "tables": tables if more or table else {}})
        given = None if optimizer is None else USERS[optimizer](model.parameters())
        found = tw.optimize(model, plan, optimizer=given, sample_inputs=sample or batch(0)[:2])
        made.append(found if optimizer else (found, found.embedding_optimizer))
    return made


def _same(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def _over(line, opt, optimizer):
    for items, users, wanted in line:
        ((opt(items, users) - wanted) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("name", "policy", "backing"), [("adagrad", "lru", "host"), ("adagrad", "lfu", "ssd"), ("sgd", "lfu", "host"), ("adam", "lru", "ssd"), ("adam", "lfu", "host")])
def test_the_users_optimizer_trains_the_same(tmp_path, late, name, policy, backing):
    (opt, optimizer), (plain, other) = _pair(_storage(tmp_path, backing, policy=policy, cache={"sgd": 23_000, "adagrad": 46_000, "adam": 72_000}[name]), name)
    for model, o in ((opt, optimizer), (plain, other)):
        train(model, o, 0, 25)
    _over(tw.pipeline([batch(k) for k in range(25, 50)], opt, inputs=lambda b: b[:2]), opt, optimizer)
    train(plain, other, 25, 50)
    _same(opt, plain)
    found = opt.tiers["item.weight"]
    assert found.written and found.read and found.hits and not found.batches and found.bytes_in and found.bytes_out
    assert torch.equal(opt(*batch(99)[:2]), plain(*batch(99)[:2]))


@pytest.mark.parametrize("inside", [True, False], ids=["in_backward", "step"])
@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_the_plans_optimizer_trains_the_same(monkeypatch, kind, inside):
    monkeypatch.setattr(device, "SlotMoves", LateMoves)
    (opt, _), (plain, _) = _pair(_storage(None, cache=15_000), None, table={"embedding_optimizer": {kind: {"lr": 0.1, "in_backward": inside}}})
    for step in range(30):
        for model in (opt, plain):
            items, users, wanted = batch(step)
            ((model(items, users) - wanted) ** 2).mean().backward()
            if not inside:
                model.embedding_optimizer.step()
            model.zero_grad()
    _same(opt, plain)
    assert opt.tiers["item.weight"].written


def test_lookups_of_a_pipeline_are_not_compared_and_others_are(late):
    """Batches that are left out, evaluations between, other tensors than were given out, tensors written by the loop: always the right rows."""
    pairs = _pair(_storage(None, cache=60_000))
    compared = []
    for opt, optimizer in pairs:
        batches = tw.pipeline([batch(k) for k in range(40)], opt, inputs=lambda b: b[:2])
        for k, (items, users, wanted) in enumerate(batches):
            if k % 8 == 5:
                continue
            if k % 8 == 6:
                with torch.no_grad():
                    opt(*batch(1000 + k)[:2])
            if k % 8 == 7:
                items = items.clone()  # the same values: prefetched rows serve
            if k == 20:
                items.fill_(11)  # the loop changes what it was given
            ((opt(items, users) - wanted) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if k == 10 and opt is pairs[0][0]:
                compared.append(opt._tiered.files["item.weight"].compared)
    _same(pairs[0][0], pairs[1][0])
    assert compared == [1] and pairs[0][0]._tiered.files["item.weight"].compared > 1 and pairs[0][0].tiers["item.weight"].batches == 0


def test_pipelines_side_by_side():
    """Each has a batch 0, a batch 1 and so on in the same table: none gets the other's rows."""
    (opt, optimizer), (plain, plainly) = _pair(_storage(None, cache=60_000))
    asked = [threading.Event() for _ in range(9)]

    def fast():
        for k in range(8):
            yield batch(100 + k)
            asked[k].set()  # its rows were prefetched

    def slow():
        for k in range(8):
            assert k == 0 or asked[k].wait(60)
            yield batch(k)

    lines = [tw.pipeline(each(), opt, inputs=lambda b: b[:2], prefetch=3) for each in (slow, fast)]
    for k, pair in enumerate(zip(*lines)):
        _over(pair, opt, optimizer)
        _over((batch(k), batch(100 + k)), plain, plainly)
    _same(opt, plain)


def test_a_call_that_fails_between_lookups_is_made_again(monkeypatch):
    torch.manual_seed(0)
    (opt, _), (plain, _) = _pair(_storage(None, cache=60_000), "sgd", _Twice, (torch.arange(20), torch.arange(20)))
    table = opt._tiered.files["item.weight"]
    slots, calls = table.slots, []

    def failing(ids, first=True):
        calls.append(ids)
        if len(calls) == 4:
            raise MemoryError
        return slots(ids, first)

    monkeypatch.setattr(table, "slots", failing)
    with torch.no_grad():
        for k, given in enumerate(tw.pipeline([(torch.randint(0, 500, (20,)), torch.randint(0, 500, (20,))) for _ in range(4)], opt)):
            if k == 1:
                with pytest.raises(MemoryError):
                    opt(*given)
            assert torch.equal(opt(*given), plain(*given))
    assert len(calls) == 10


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.item = nn.Embedding(500, 8, sparse=True)

    def forward(self, one, other):
        return torch.cat([self.item(one), self.item(other) * 2], 1)


def test_a_loader_that_writes_into_one_batch_again_gets_the_rows_of_what_is_there(late):
    """The rows were fetched for what the tensors held before: they may not serve what they hold now."""
    (opt, _), (plain, _) = _pair(_storage(None))
    items, users, _ = batch(0)

    def loader():
        for k in range(6):
            items.copy_(batch(k)[0])
            yield items, users

    with torch.no_grad():
        for given in tw.pipeline(loader(), opt, prefetch=1):
            time.sleep(0.02)  # the loader is ahead by now
            kept = [g.clone() for g in given]
            found = opt(*given)
            if all(torch.equal(a, b) for a, b in zip(kept, given)):
                assert torch.equal(found, plain(*kept))


def test_ids_of_host_batches_and_inputs_copied_to_the_device(late):
    """The whole way of a GPU: packed inputs, ids made on the host, in a model with several tables and lookups of one."""

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.item, self.more, self.top = nn.Embedding(1000, 8, padding_idx=3), nn.Embedding(900, 4), nn.Linear(24, 1)

        def forward(self, items, users):
            found = [self.item(items[:, 0]), self.item(items[:, 1]), self.more(users[:, 0]), self.more(users[:, 1] + 1)]
            return self.top(torch.cat(found, 1)).squeeze(1)

    results = []
    for stored in (True, False):
        torch.manual_seed(0)
        model = Several()
        tables = {"item": {"storage": _storage(None, cache=40_000)}, "more": {"storage": _storage(None, cache=20_000)}} if stored else {}
        opt, optimizer = tw.optimize(model, tw.Plan.from_dict({"version": 1, "tables": tables}), optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1), sample_inputs=batch(0)[:2])
        line = tw.pipeline([batch(k) for k in range(30)], opt, inputs=lambda b: b[:2])
        line._copies.device = torch.device("cpu")  # as if that were a GPU
        _over(line, opt, optimizer)
        results.append(opt)
        if stored:
            assert line.report.ahead == 30 and line.report.copied and sum(t.compared for t in opt._tiered.files.values()) == 0
            assert line.report.misses and all(c.batches == 0 for c in opt.tiers.values())
    _same(*results)


def test_state_dicts_are_whole_both_ways():
    (opt, optimizer), (plain, other) = _pair(_storage(None))
    for model, o in ((opt, optimizer), (plain, other)):
        train(model, o, 0, 15)
    saved = [copy.deepcopy(o.state_dict()) for o in (optimizer, other)]
    for place, state in saved[1]["state"].items():
        assert torch.equal(saved[0]["state"][place]["sum"], state["sum"])
    fresh = Model()
    for model, o, state in ((opt, optimizer, saved[1]), (plain, other, saved[0])):
        train(model, o, 15, 18)
        model.load_state_dict(fresh.state_dict())
        o.load_state_dict(state)
        train(model, o, 18, 30)
    _same(opt, plain)
    assert torch.equal(opt.unoptimized()(*batch(7)[:2]), opt(*batch(7)[:2]))


@pytest.mark.parametrize("backing", ["host", "ssd"])
def test_snapshot_and_restore_go_on_as_if_nothing_had_happened(tmp_path, late, backing):
    opt, optimizer = model_in(tmp_path, cache_on="cpu", backing=backing)
    train(opt, optimizer, 0, 12)
    line = iter(tw.pipeline([batch(k) for k in range(12, 20)], opt, inputs=lambda b: b[:2]))
    next(line)
    opt.snapshot(tmp_path / "kept", optimizer)  # while rows are on their way
    line.close()
    train(opt, optimizer, 12, 20)  # lost
    opt._tiered.open["item.weight"].cache.close()
    again, optimizer = model_in(tmp_path, resume=True, cache_on="cpu", backing=backing)
    train(again, optimizer, 12, 24)
    (tmp_path / "other").mkdir()
    straight, optimizer = model_in(tmp_path / "other")
    train(straight, optimizer, 0, 24)
    _same(again, straight)


@pytest.mark.parametrize("backing", ["host", "ssd"])
def test_kill_at_any_moment(tmp_path, backing):
    for opt, optimizer, _, straight, other in after_kills(tmp_path, 2 if backing == "host" else 1, seed=1, cache_on="cpu", backing=backing):
        _same(opt, straight)
        assert torch.equal(optimizer.state[opt.top.weight]["sum"], other.state[straight.top.weight]["sum"])


def test_snapshots_of_other_tables_and_damaged_ones_are_named(tmp_path):
    opt, optimizer = model_in(tmp_path, **HOST)
    train(opt, optimizer, 0, 3)
    opt.snapshot(tmp_path / "kept", optimizer)
    opt.snapshot(tmp_path / "kept", optimizer)
    rows = tmp_path / "kept" / "rows-2.pt"
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["dense-2.pt", "rows-2.pt", "snapshot.json"]
    items, users, wanted = batch(3)
    pending = opt(items, users)
    with pytest.raises(TierError, match="table 'item.weight': 1 lookups wait for their update"):
        opt.restore(tmp_path / "kept", optimizer)
    ((pending - wanted) ** 2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    kept = copy.deepcopy(opt.state_dict())
    whole = rows.read_bytes()
    for wrong in (whole[: len(whole) // 2], b"", b"something else"):
        rows.write_bytes(wrong)
        with pytest.raises(TierError, match="rows-2.pt cannot be read .*restore the snapshot from a copy"):
            opt.restore(tmp_path / "kept", optimizer)
    rows.unlink()
    with pytest.raises(TierError, match="rows-2.pt cannot be read"):
        opt.restore(tmp_path / "kept", optimizer)
    rows.write_bytes(whole)
    other, given = model_in(tmp_path, seed=5, **HOST)
    with pytest.raises(TierError, match="holds other tables in the host's memory: .*seed 0.*the plan has .*seed 5"):
        other.restore(tmp_path / "kept", given)
    assert all(torch.equal(kept[n], v) for n, v in opt.state_dict().items())
    opt.restore(tmp_path / "kept", optimizer)
    train(opt, optimizer, 3, 4)
    assert all(torch.equal(kept[n], v) for n, v in opt.state_dict().items())
    (tmp_path / "plain").mkdir()
    plain, stepped = model_in(tmp_path / "plain", cache_on="cpu")
    with pytest.raises(TierError, match="item.weight"):
        plain.restore(tmp_path / "kept", stepped)


def test_a_table_on_the_meta_device_starts_from_its_seed(tmp_path):
    torch.manual_seed(0)
    model = Model(device="meta", rows=2**31)
    plan = tw.Plan.from_dict({"version": 1, "tables": {"item": {"storage": _storage(tmp_path, "ssd", init={"uniform": [-0.1, 0.1]}, seed=5)}}})
    opt, optimizer = tw.optimize(model, plan, optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1), sample_inputs=batch(0, 2**31)[:2])
    items, users, _ = batch(1, 2**31)
    items[0, 0] = 3
    expected = Part(8, "uniform", -0.1, 0.1).rows(0, 5, items.flatten()).view(32, 2, 8)
    expected[items == 3] = 0
    torch.testing.assert_close(opt(items, users), opt.top(torch.cat([expected.flatten(1), opt.user(users)], 1)).squeeze(1))
    assert torch.equal(opt(items.int(), users), opt(items, users)) and len(opt._variants) == 2  # captured anew, with a stand-in again


def test_lookups_stay_apart_from_the_interaction_that_reads_them():
    class Dots(nn.Module):
        def __init__(self):
            super().__init__()
            self.item, self.user, self.bottom = nn.Embedding(1000, 8), nn.Embedding(500, 8), nn.Linear(1, 8)
            i, j = torch.tril_indices(3, 3, -1)
            self.register_buffer("i", i)
            self.register_buffer("j", j)

        def forward(self, items, users):
            x = self.bottom(items[:, :1] / 1000)
            z = torch.stack([x, self.item(items[:, 1]), self.user(users[:, 0])], 1)
            return torch.cat([x, torch.bmm(z, z.transpose(1, 2))[:, self.i, self.j]], 1).sum(1)

    made = []
    for storage in ({"storage": _storage(None)}, {}):
        torch.manual_seed(0)
        model = Dots()
        passes = {name: {"measure": False} for name in ("fuse_dot_interaction", "fuse_lookup_dots")}
        plan = tw.Plan.from_dict({"version": 1, "tables": {"item": storage} if storage else {}, "passes": passes})
        made.append(tw.optimize(model, plan, optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1), sample_inputs=batch(0)[:2]))
    for opt, optimizer in made:
        train(opt, optimizer, 0, 10)
    (row,) = made[0][0].report.skipped("fuse_lookup_dots")
    assert "table 'item.weight' is in tiers or has dynamic ids" in row.reason
    assert made[1][0].report.coverage["looked-up interactions"] == (1, 1)
    for name, value in made[1][0].state_dict().items():
        torch.testing.assert_close(made[0][0].state_dict()[name], value)


def test_the_report_counts_what_was_moved():
    (opt, optimizer), _ = _pair(_storage(None))
    train(opt, optimizer, 0, 10)
    found, said = opt.tiers["item.weight"], str(opt.report)
    assert found.bytes_in == found.misses * 64 and found.bytes_out == found.written * 64 and found.late == 0 and found.stalled == 0
    assert "1,000 rows in the host's memory, 464 of them in a cache of 0.00 GB on cpu (lru)" in said
    assert f"item.weight: {found.hits:,} hits and {found.misses:,} misses" in said and "MB of rows to the device and" in said


def test_refusals(tmp_path):
    def refused(words, storage, model=None, **plan):
        model = model or Model()
        with pytest.raises(PlanError, match=words):
            made = tw.Plan.from_dict({"version": 1, "tables": {"item": {"storage": storage}}, **plan})
            opt, _ = tw.optimize(model, made, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), sample_inputs=batch(0)[:2])
            tw.pipeline([], opt)

    refused("a cache of memory in memory gains nothing", {"cache": 1, "backing": "host"})
    refused("rows in the host's memory have no file", {"cache": 1, "backing": "host", "cache_on": "cuda", "path": "x"})
    refused("opt.restore.folder. reads such rows", {"cache": 1, "backing": "host", "cache_on": "cuda", "resume": "x"})
    refused("says no path", {"cache": 1, "cache_on": "cuda"})
    refused("cache_on: cuda, and is torch.float32 on cpu; float32 on cuda was needed", {"cache": 1, "backing": "host", "cache_on": "cuda"})
    refused("the machine has .* GB of memory: say backing: ssd", _storage(None), Model(device="meta", rows=2**40))
    refused("has its cache on a device, for which lookups are not run ahead", _storage(None), numerics="approximate", pipeline={"staleness": 1})
    plan = tw.Plan.from_dict({"version": 1, "tables": {"item": {"storage": {"cache": "12GB", "cache_on": "cuda", "backing": "host"}}}})
    plan.save(tmp_path / "plan.yaml")
    assert tw.Plan.load(tmp_path / "plan.yaml") == plan and "path" not in (tmp_path / "plan.yaml").read_text()
