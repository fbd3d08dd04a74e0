"""tw.pipeline: the same training with rows fetched ahead, for every order of things that may go wrong."""
from __future__ import annotations

import threading
import time

import pytest
import tablewright as tw
import torch
from tablewright.kernels import tiers
from tablewright.kernels.tiers import TierError
from tablewright.rewriter import prefetch
from tablewright.rewriter.errors import PlanError
from tier_training import batch, model_in
from torch import nn

pytestmark = pytest.mark.skipif(bool(tiers.available()), reason=f"NOT TESTED: {tiers.available()}")


def _train(opt, optimizer, batches):
    for items, users, wanted in batches:
        ((opt(items, users) - wanted) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _two(tmp_path):
    made = []
    for name in "ab":
        (tmp_path / name).mkdir()
        made.append(model_in(tmp_path / name))
    return made


def _same(a, b):
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_fifty_steps_are_the_same(tmp_path, prefetch):
    (opt, optimizer), (plain, other) = _two(tmp_path)
    line = tw.pipeline([batch(k) for k in range(50)], opt, inputs=lambda b: b[:2], prefetch=prefetch)
    _train(opt, optimizer, line)
    _train(plain, other, [batch(k) for k in range(50)])
    _same(opt, plain)
    assert line.report.batches == line.report.ahead == 50 and not line.report.not_ahead and "50 batches" in str(line.report)
    assert opt.tiers["item.weight"].batches == 0 and opt.tiers["item.weight"].written
    assert all(table.looked is None for table in opt._tiered.files.values())


def test_a_report_counts_while_the_loop_runs_and_stops_with_it(tmp_path):
    opt, _ = model_in(tmp_path)
    line = tw.pipeline([batch(k) for k in range(4)], opt, inputs=lambda b: b[:2])
    with torch.no_grad():
        for k, (items, users, _) in enumerate(line):
            opt(items, users)
            assert line.report.batches == k + 1 and line.report.hits + line.report.misses > 0
        before = line.report.hits, line.report.misses, line.report.waiting
        opt(*batch(9)[:2])
    assert (line.report.hits, line.report.misses, line.report.waiting) == before


def test_batches_that_are_not_used_evaluations_between_and_a_loop_that_ends_early(tmp_path):
    (opt, optimizer), (plain, other) = _two(tmp_path)
    for model, o, batches in ((opt, optimizer, tw.pipeline([batch(k) for k in range(30)], opt, inputs=lambda b: b[:2])), (plain, other, [batch(k) for k in range(30)])):
        for k, (items, users, wanted) in enumerate(batches):
            if k % 4 == 1:
                continue
            if k % 4 == 2:
                with torch.no_grad():
                    model(*batch(1000 + k)[:2])
            if k == 25:
                break
            ((model(items, users) - wanted) ** 2).mean().backward()
            if k % 3:
                o.step()
                o.zero_grad()
    optimizer.step(), other.step()
    _same(opt, plain)
    assert opt.tiers["item.weight"].batches <= 1


def test_rows_come_before_they_are_asked_for(tmp_path):
    opt, _ = model_in(tmp_path)
    fetched, counted = threading.Event(), threading.Event()

    def loader():
        yield batch(0)
        yield batch(1)
        fetched.set()
        counted.wait(30)  # the rows of another batch would be counted, too
        yield batch(2)

    line = iter(tw.pipeline(loader(), opt, inputs=lambda b: b[:2]))
    items, users, _ = next(line)
    opt(items, users)
    assert fetched.wait(30)
    items, users, _ = next(line)
    before = opt.tiers["item.weight"]
    opt(items, users)
    after = opt.tiers["item.weight"]
    assert (after.hits, after.misses) == (before.hits, before.misses)  # nothing was fetched by the lookup itself
    counted.set()
    line.close()
    assert threading.active_count() < 50


def test_the_loaders_error_comes_at_its_batch(tmp_path):
    opt, optimizer = model_in(tmp_path)

    def loader():
        yield batch(0)
        yield batch(1)
        raise ValueError("disk gone")

    seen = []
    with pytest.raises(ValueError, match="disk gone"):
        for items, users, _ in tw.pipeline(loader(), opt, inputs=lambda b: b[:2]):
            seen.append(opt(items, users))
            optimizer.step()
    assert len(seen) == 2


def test_a_loop_that_ends_does_not_wait_for_a_loader_that_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch, "_PATIENCE", 0.05)
    opt, _ = model_in(tmp_path)
    go_on, waiting = threading.Event(), threading.Event()

    def loader():
        yield batch(0)
        waiting.set()
        go_on.wait()
        yield batch(1)

    line = iter(tw.pipeline(loader(), opt, inputs=lambda b: b[:2]))
    next(line)
    assert waiting.wait(30)
    ended = threading.Thread(target=line.close, daemon=True)
    ended.start()
    ended.join(30)
    hangs = ended.is_alive()
    go_on.set()
    assert not hangs
    for thread in [t for t in threading.enumerate() if t.name == "tablewright prefetch"]:
        thread.join(30)
    assert opt.tiers["item.weight"].batches == 0


def test_bad_ids_and_small_caches_are_errors_of_the_loop(tmp_path):
    opt, _ = model_in(tmp_path)
    items, users, wanted = batch(0)
    with pytest.raises(IndexError, match="id 1000 is out of range for table 'item.weight'"):
        list(tw.pipeline([(torch.full_like(items, 1000), users, wanted)], opt, inputs=lambda b: b[:2]))
    (tmp_path / "small").mkdir()
    small, _ = model_in(tmp_path / "small", cache=5000)
    with pytest.raises(TierError, match="were prefetched"):
        for items, users, _ in tw.pipeline([batch(k) for k in range(40)], small, inputs=lambda b: b[:2], prefetch=8):
            time.sleep(0.02)
            small(items, users)


def test_what_cannot_be_fetched_ahead_says_why(tmp_path):
    opt, _ = model_in(tmp_path)
    line = tw.pipeline([batch(0)], opt)  # the target is no input of the model
    assert len(list(line)) == 1 and "inputs=" in line.report.not_ahead
    plain = tw.optimize(nn.Sequential(nn.Embedding(10, 4)), sample_inputs=(torch.tensor([1]),))
    line = tw.pipeline([torch.tensor([1])] * 3, plain)
    assert len(list(line)) == 3 and line.report.not_ahead == "no table is in tiers"

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.item = nn.Embedding(1000, 4)

        def forward(self, ids):
            return self.item((ids + torch.randint_like(ids, 3)) % 1000)

    model = Noisy()
    plan = tw.Plan.from_dict({"version": 1, "tables": {"item": {"storage": {"cache": 20_000, "path": str(tmp_path / "noisy")}}}})
    noisy, _ = tw.optimize(model, plan, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), sample_inputs=(torch.tensor([1, 2]),))
    line = tw.pipeline([torch.tensor([1, 2])], noisy)
    assert len(list(line)) == 1 and "may not run twice" in line.report.not_ahead
    for wrong in (lambda: tw.pipeline([], model), lambda: tw.pipeline([], noisy, prefetch=0)):
        with pytest.raises(PlanError):
            wrong()
