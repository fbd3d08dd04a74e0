"""Caches on a device over a file or the host's memory, with their slots on the CPU: no update is lost, whenever rows really arrive.

By hand: ``python tests/kernels/test_device_cache.py [--steps 20000]`` for longer random runs.
"""
from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import pytest
import torch
from late_moves import LateMoves
from tablewright.kernels import tiers
from tablewright.kernels.tiers import Part, RowCache, TierError, device
from tablewright.kernels.tiers.cache import HostRows
from tablewright.kernels.tiers.device import DeviceCache
from tablewright.kernels.tiers.slot_moves import SlotMoves

pytestmark = pytest.mark.skipif(bool(tiers.available()), reason=f"NOT TESTED: {tiers.available()}")
ROWS = 3000
PARTS = [Part(4, "uniform", -0.5, 0.5), Part(1, "constant", 0.1)]


def _opened(where, slots=512, policy="lru", seed=3):
    home = HostRows(ROWS, PARTS) if where is None else where
    return DeviceCache(home, ROWS, PARTS, slots, seed=seed, policy=policy)


def _random_run(where, policy, steps, seed=0):
    """Random batches, up to three under way, updated when the oldest ends; reads, writes and snapshots between; against whole tensors."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cache = _opened(where, policy=policy)
    expected = [p.rows(n, 3, torch.arange(ROWS)) for n, p in enumerate(PARTS)]
    under_way = []
    for step in range(steps):
        count = chance.choice([0, 1, 7, 60])
        ids = torch.randint(0, ROWS, (count,), generator=generator) if step % 3 else (torch.randn(count, generator=generator).abs() * 200).long()
        slots, ticket = cache.fetch(ids)
        under_way.append((ids, cache.on_device(slots, ticket), ticket))
        if len(under_way) == 3 or step == steps - 1:
            for ids, slots, ticket in under_way[: 1 if step < steps - 1 else 3]:
                cache.join(ticket)
                for part, whole in zip(cache.parts, expected):
                    assert torch.equal(part[slots], whole[ids])
                rows, first = torch.unique(ids, return_inverse=True)
                places = torch.empty_like(rows).scatter_(0, first, slots)
                for part, whole in zip(cache.parts, expected):
                    part[places] += rows[:, None].float() * 0.01 + step
                    whole[rows] += rows[:, None].float() * 0.01 + step
                cache.release(ticket)
            under_way = under_way[1:]
        what = chance.random()
        if what < 0.03:
            part, rows = chance.randrange(2), torch.randperm(ROWS, generator=generator)[:20]
            assert torch.equal(cache.read(rows, part), expected[part][rows])
        elif what < 0.06:
            part, rows = chance.randrange(2), torch.randperm(ROWS, generator=generator)[:20]
            values = torch.rand(20, PARTS[part].width, generator=generator)
            cache.write(rows, values, part)
            expected[part][rows] = values
        elif what < 0.07:
            cache.snapshot()
    found = cache.counters()
    assert found.batches == 0 and found.hits and found.made and found.read and found.written
    for n, whole in enumerate(expected):
        assert torch.equal(cache.read(torch.arange(ROWS), n), whole)
    assert found.bytes_in == found.misses * 20 and found.bytes_out >= found.written * 20
    return cache, expected


@pytest.mark.parametrize("moves", [SlotMoves, LateMoves])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("backing", ["host", "ssd"])
def test_no_update_is_lost(tmp_path, monkeypatch, backing, policy, moves):
    monkeypatch.setattr(device, "SlotMoves", moves)
    home = HostRows(ROWS, PARTS) if backing == "host" else tmp_path
    cache, expected = _random_run(home, policy, 500)
    cache.snapshot()
    cache.close()
    for kind in (RowCache, DeviceCache):  # the store has it all, for either kind of cache
        again = kind(home, ROWS, PARTS, 16, seed=3)
        for n, whole in enumerate(expected):
            assert torch.equal(again.read(torch.arange(ROWS), n), whole)
        again.close()


def test_what_is_not_in_a_snapshot_is_dropped(tmp_path):
    cache = _opened(tmp_path)
    rows = torch.arange(100)
    for value, kept in ((1.0, True), (2.0, False)):
        slots, ticket = cache.fetch(rows)
        cache.parts[0][slots] = value
        cache.release(ticket)
        if kept:
            cache.snapshot()
    cache.close()
    assert _opened(tmp_path).read(rows).unique().tolist() == [1.0]


def test_rows_that_were_never_written_take_no_memory_and_start_from_their_seed():
    home = HostRows(ROWS, PARTS)
    cache = _opened(home, seed=9)
    slots, ticket = cache.fetch(torch.tensor([5, 7]), train=False)
    assert torch.equal(cache.parts[0][slots], PARTS[0].rows(0, 9, torch.tensor([5, 7])))
    cache.release(ticket)
    cache.snapshot()
    assert not home.written.any() and not home.records.any() and cache.counters().stored == 0
    cache.write(torch.tensor([8]), torch.ones(1, 4))
    assert cache.counters().stored == 1 and home.records[8].tolist() == [1, 1, 1, 1, pytest.approx(0.1)] and int(home.written[1]) == 1


def _full_of_changed_rows(cache):
    slots, ticket = cache.fetch(torch.arange(300))
    cache.parts[0][slots] = 7.0
    cache.release(ticket)


@pytest.mark.parametrize("failing", ["out", "room"])
def test_a_move_that_fails_leaves_the_cache_as_it_was(monkeypatch, failing):
    cache = _opened(None)
    _full_of_changed_rows(cache)
    before, held = cache.counters(), cache.read(torch.arange(ROWS))

    def broken(*_):
        raise MemoryError("no room on the device")

    with monkeypatch.context() as patched:
        patched.setattr(cache._moves, failing, broken)
        with pytest.raises(MemoryError, match="no room on the device"):
            cache.fetch(torch.arange(1000, 1300))
    assert torch.equal(cache.read(torch.arange(ROWS)), held)
    assert (cache.counters().hits, cache.counters().misses, cache.counters().batches) == (before.hits, before.misses, 0)
    slots, ticket = cache.fetch(torch.arange(300))
    assert torch.equal(cache.parts[0][slots], held[:300])
    cache.release(ticket)


def test_rows_that_never_reached_their_slots_are_an_error_from_then_on(monkeypatch):
    cache = _opened(None)

    def broken(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(cache._moves, "into", broken)
    with pytest.raises(RuntimeError, match="the device is gone"):
        cache.fetch(torch.arange(10))
    monkeypatch.undo()
    for call in (lambda: cache.fetch(torch.arange(10)), cache.snapshot, lambda: cache.read(torch.arange(10)), lambda: cache.write(torch.arange(1), torch.ones(1, 4))):
        with pytest.raises(TierError, match="lost on their way to cpu .the device is gone.: go on from the last snapshot"):
            call()


def test_ids_out_of_range_and_caches_that_are_too_small(tmp_path):
    cache = _opened(tmp_path)
    for call in (lambda: cache.fetch(torch.tensor([ROWS])), lambda: cache.read(torch.tensor([-1])), lambda: cache.write(torch.tensor([ROWS]), torch.ones(1, 4))):
        with pytest.raises(TierError, match="out of range"):
            call()
    _full_of_changed_rows(cache)
    slots, ticket = cache.fetch(torch.arange(300))
    with pytest.raises(TierError, match="the cache is too small"):
        cache.fetch(torch.arange(1000, 1400))
    with pytest.raises(TierError, match="replaced while batches are under way"):
        cache.forget()
    assert torch.equal(cache.parts[0][slots], torch.full((300, 4), 7.0))
    cache.release(ticket)


def test_many_rows_at_once_come_and_leave():
    rows = 20_000
    home = HostRows(rows, PARTS)
    home.records[:] = torch.arange(rows)[:, None] + torch.arange(5) * 0.1
    home.written[:] = 255
    expected = home.records.clone()
    cache = DeviceCache(home, rows, PARTS, 16_384)
    for first in (0, 10_000, 5_000, 0):  # so many that several threads copy them
        ids = torch.arange(first, first + 10_000)
        slots, ticket = cache.fetch(ids)
        for part, columns in zip(cache.parts, (slice(4), slice(4, 5))):
            assert torch.equal(part[slots], expected[ids, columns])
            part[slots] *= 2
            expected[ids, columns] *= 2
        cache.release(ticket)
    assert cache.counters().written > 4000
    cache.prepare()
    assert torch.equal(home.records, expected)


def test_forgetting_reads_the_store_anew():
    home = HostRows(ROWS, PARTS)
    cache = _opened(home)
    _full_of_changed_rows(cache)
    cache.prepare()
    home.records[:300] = 5.0
    _full_of_changed_rows(cache)
    cache.forget()
    assert cache.read(torch.arange(300)).unique().tolist() == [5.0] and cache.counters().present == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    device.SlotMoves = LateMoves  # type: ignore[misc]
    for number in range(4):
        with tempfile.TemporaryDirectory() as folder:
            done, _ = _random_run(None if number % 2 else Path(folder), ["lru", "lfu"][number // 2], parser.parse_args().steps, number)
            print(done.counters())
