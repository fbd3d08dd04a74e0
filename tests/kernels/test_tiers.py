"""Rows in a file behind a cache: no update is lost, snapshots are whole or absent, bad files are named.

By hand: ``python tests/kernels/test_tiers.py [--operations 10000000] [--kills 50]``, a few minutes.
"""
from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tablewright
import torch
from tablewright.kernels import tiers
from tablewright.kernels.tiers import Part, RowCache, TierError
from tablewright.kernels.tiers.table import TieredTable
from tier_writer import ROWS, ids_of, opened

pytestmark = pytest.mark.skipif(bool(tiers.available()), reason=f"NOT TESTED: {tiers.available()}")
PARTS = [Part(4, "uniform", -0.5, 0.5), Part(1, "constant", 0.1)]


def _model(seed):
    """A dict of what every row must hold, by the starting values alone."""
    ids = torch.arange(3000)
    return [p.rows(n, seed, ids) for n, p in enumerate(PARTS)]


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_no_update_is_lost(tmp_path, policy):
    """Random batches, several under way at once, against tensors that hold the whole table."""
    chance = random.Random(0)
    cache = RowCache(tmp_path, 3000, PARTS, 512, seed=3, policy=policy)
    expected = _model(3)
    under_way = []
    for step in range(600):
        ids = torch.randint(0, 3000, (chance.choice([0, 1, 7, 60]),)) if step % 3 else (torch.randn(60).abs() * 200).long().clamp(max=2999)
        slots, ticket = cache.fetch(ids)
        under_way.append((ids, slots, ticket))
        if len(under_way) > 2 or step == 599:
            for ids, slots, ticket in under_way[:1] if step < 599 else under_way:
                for part, whole in zip(cache.parts, expected):
                    assert torch.equal(part[slots], whole[ids])
                    rows = torch.unique(ids)
                    places = cache.fetch(rows)
                    part[places[0]] += rows[:, None].float() * 0.01 + step
                    whole[rows] += rows[:, None].float() * 0.01 + step
                    cache.release(places[1])
                cache.release(ticket)
            under_way = under_way[1:]
        if step % 97 == 0:
            cache.snapshot()
    found = cache.counters()
    assert found.read and found.written and found.made and found.hits and found.batches == 0
    for n, whole in enumerate(expected):
        assert torch.equal(cache.read(torch.arange(3000), n), whole)
    cache.snapshot()
    cache.close()
    again = RowCache(tmp_path, 3000, PARTS, 16, seed=3)
    for n, whole in enumerate(expected):
        assert torch.equal(again.read(torch.arange(3000), n), whole)


def _against_a_dict(folder, operations, seed=0):
    """Rows that come (from their seed, or again from the file), are updated, and leave, as a prefetching loop does it, until ``operations``
    of these happened; now and then a snapshot, now and then a crash, after which the last snapshot counts. A dict says what each row must
    be. Returns (made, read again, written back, snapshots, crashes)."""
    rows, batch = max(2000, operations // 5), 1500 if operations > 10**6 else 100
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    parts, totals, snapshots, crashes = [Part(4, "normal", 0.0, 1.0), Part(1)], [0, 0, 0], 0, 0
    model: dict[int, tuple[float, float]] = {}  # row: (its weights, how often it was updated)
    safe = dict(model)

    def opened():
        return RowCache(folder, rows, parts, batch * 12, seed=seed, policy=chance.choice(["lru", "lfu"]))

    def draw():
        uniform = torch.rand(batch, generator=generator)
        return torch.unique(((uniform if chance.random() < 0.5 else uniform**4) * rows).long().clamp(max=rows - 1))

    def happened(cache):
        found = cache.counters()
        return found.made, found.read, found.written

    def check(found, ids):
        known = [model.get(row) for row in ids.tolist()]
        fresh = torch.tensor([k is None for k in known])
        expected = [parts[0].rows(0, seed, ids), torch.zeros(len(ids), 1)]
        for part, whole in enumerate(expected):
            whole[~fresh] = torch.tensor([k[part] for k in known if k is not None])[:, None]
            assert torch.equal(found[part], whole), f"rows {ids[(found[part] != whole).any(1)][:5].tolist()} are not what they were left as"

    cache, step = opened(), 0
    with ThreadPoolExecutor(1) as ahead:
        coming = draw()
        under_way = ahead.submit(cache.fetch, coming)
        while sum(totals) + sum(happened(cache)) < operations:
            (slots, ticket), ids = under_way.result(), coming
            coming = draw()
            under_way = ahead.submit(cache.fetch, coming)  # while this batch trains
            check([part[slots] for part in cache.parts], ids)
            step += 1
            cache.parts[0][slots] = float(step)
            cache.parts[1][slots] += 1
            model.update((row, (float(step), model.get(row, (0.0, 0.0))[1] + 1)) for row in ids.tolist())
            cache.release(ticket)
            what = chance.random()
            if what < 0.02:
                under_way.result()
                cache.snapshot()
                safe, snapshots = dict(model), snapshots + 1
            elif what < 0.025:
                under_way.result()
                totals = [a + b for a, b in zip(totals, happened(cache))]
                cache.close()
                model, cache, crashes = dict(safe), opened(), crashes + 1
                coming = draw()
                under_way = ahead.submit(cache.fetch, coming)
        cache.release(under_way.result()[1])
    for first in range(0, rows, 100_000):
        ids = torch.arange(first, min(rows, first + 100_000))
        check([cache.read(ids, part) for part in range(2)], ids)
    made, read, written = (a + b for a, b in zip(totals, happened(cache)))
    cache.close()
    return made, read, written, snapshots, crashes


def test_against_a_dict(tmp_path):
    made, read, written, snapshots, crashes = _against_a_dict(tmp_path, 60_000)
    assert min(made, read, written) > 1000 and snapshots and crashes


def test_starting_values_depend_on_seed_and_row_alone(tmp_path):
    normal = Part(64, "normal", 1.0, 2.0)
    rows = torch.arange(4000)
    values = normal.rows(0, 5, rows)
    assert abs(values.mean() - 1) < 0.02 and abs(values.std() - 2) < 0.02 and values.unique().numel() > 100_000  # of about 400,000 that there are
    assert torch.equal(normal.rows(0, 5, rows.flip(0)).flip(0), values)
    assert not torch.equal(normal.rows(0, 6, rows), values) and not torch.equal(normal.rows(1, 5, rows), values)
    uniform = Part(64, "uniform", -2.0, 1.0).rows(0, 5, rows)
    assert uniform.min() >= -2 and uniform.max() < 1 and abs(uniform.mean() + 0.5) < 0.02


@pytest.mark.parametrize(("rows", "slots"), [(1, 16), (17, 48), (256, 64), (257, 16), (100_003, 7 * 16), (2**27 + 3, 80), (2**29, 16)])
def test_a_row_is_known_again_whatever_the_sizes(tmp_path, rows, slots):
    """A slot says its row by 32 bits: rows that leave go to the store under their own number, also from their second set."""
    cache, whole, generator = RowCache(tmp_path, rows, [Part(1)], slots), {}, torch.Generator().manual_seed(rows)
    under_way, seen = [], torch.randint(0, rows, (300,), generator=generator)
    for step in range(1, 200):
        ids = torch.unique(seen[torch.randint(0, 300, (slots // 5,), generator=generator)])
        try:
            if step % 3 == 0:
                under_way.append(cache.fetch(ids)[1])  # so that rows go to their second sets
            slots_of, ticket = cache.fetch(ids)
        except TierError:
            [cache.release(under_way.pop()) for _ in range(len(under_way))]
            slots_of, ticket = cache.fetch(ids)
        assert cache.parts[0][slots_of, 0].tolist() == [whole.get(row, 0.0) for row in ids.tolist()]
        cache.parts[0][slots_of] = float(step)
        whole.update(dict.fromkeys(ids.tolist(), float(step)))
        cache.release(ticket)
        if len(under_way) > 2:
            cache.release(under_way.pop(0))
    assert cache.read(seen)[:, 0].tolist() == [whole.get(row, 0.0) for row in seen.tolist()]


def test_a_cache_may_be_too_small_for_its_table(tmp_path):
    with pytest.raises(TierError, match="a cache of 16 slots is too small for a table of 536870913 rows"):
        RowCache(tmp_path, 2**29 + 1, [Part(1)], 16)


def test_a_huge_table_starts_in_no_time_and_takes_no_room(tmp_path):
    cache = RowCache(tmp_path, 2**31, [Part(64, "normal", 0.0, 0.01), Part(64)], 1024)
    ids = torch.tensor([0, 2**31 - 1, 12345])
    slots, ticket = cache.fetch(ids)
    cache.parts[0][slots] = 3.0
    cache.release(ticket)
    cache.snapshot()
    assert torch.equal(cache.read(ids), torch.full((3, 64), 3.0))
    used = sum(f.stat().st_blocks * 512 for f in tmp_path.iterdir())
    assert (tmp_path / "rows.dat").stat().st_size > 2**40 and used < 2**20


def test_what_was_not_snapshot_is_dropped_whole(tmp_path):
    cache = RowCache(tmp_path, 3000, PARTS, 64, seed=1)
    ids = torch.arange(0, 3000, 3)
    cache.write(ids, torch.ones(1000, 4))
    assert cache.snapshot() == 1
    cache.write(ids, torch.full((1000, 4), 2.0))
    for start in range(0, 3000, 16):  # evictions write to the journal
        cache.release(cache.fetch(torch.arange(start, min(start + 16, 3000)))[1])
    cache.close()
    again = RowCache(tmp_path, 3000, PARTS, 64, seed=1)
    assert torch.equal(again.read(ids), torch.ones(1000, 4))
    assert torch.equal(again.read(ids + 1), PARTS[0].rows(0, 1, ids + 1))
    assert again.counters().generation == 1 and again.counters().stored == 1000


def test_a_commit_that_was_interrupted_is_finished(tmp_path):
    """COMMIT is there and the journal whole: opening copies it, and may be stopped and done again."""
    cache = RowCache(tmp_path, 3000, PARTS, 64, seed=1)
    cache.write(torch.arange(100), torch.full((100, 4), 5.0))
    cache.prepare()
    journal = (tmp_path / "journal.dat").read_bytes()
    cache.close()
    (tmp_path / "COMMIT").write_bytes((1).to_bytes(8, "little") + len(journal).to_bytes(8, "little") + (100).to_bytes(8, "little"))
    again = RowCache(tmp_path, 3000, PARTS, 64, seed=1)
    assert torch.equal(again.read(torch.arange(100)), torch.full((100, 4), 5.0)) and not (tmp_path / "COMMIT").exists()
    again.close()
    (tmp_path / "journal.dat").write_bytes(journal)
    (tmp_path / "COMMIT").write_bytes((2).to_bytes(8, "little") + len(journal).to_bytes(8, "little") + (100).to_bytes(8, "little"))
    damaged = bytearray(journal)
    damaged[60] ^= 1
    (tmp_path / "journal.dat").write_bytes(damaged)
    with pytest.raises(TierError, match="journal.dat is damaged at byte"):
        RowCache(tmp_path, 3000, PARTS, 64, seed=1)


@pytest.mark.parametrize("kills", [4])
def test_after_kill_the_last_snapshot_is_there(tmp_path, kills):
    """kill -9 at random moments, again and again: every row is as the snapshot's step left it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(tablewright.__file__).parent.parent), str(Path(__file__).parent)])}
    first, chance = 0, random.Random(1)
    for _ in range(kills):
        writer = subprocess.Popen([sys.executable, str(Path(__file__).parent / "tier_writer.py"), str(tmp_path), str(first)], stdout=subprocess.PIPE, env=environment)
        assert writer.stdout.readline()
        time.sleep(chance.random() * 0.5)
        writer.send_signal(signal.SIGKILL)
        said = [int(line) for line in writer.stdout.read().split()]
        writer.wait()
        cache = opened(tmp_path)
        steps = cache.counters().generation * 5  # a snapshot every five steps
        assert steps >= (said[-1] + 1 if said else first + 5)
        last = torch.full((ROWS,), -1)
        for step in range(steps):
            last[ids_of(step)] = step
        touched = torch.nonzero(last >= 0).flatten()
        assert torch.equal(cache.read(touched, 1)[:, 0], last[touched].float())
        assert torch.equal(cache.read(touched)[:, 0], (last[touched] + touched / 1000).float())
        fresh = torch.nonzero(last < 0).flatten()
        assert torch.equal(cache.read(fresh), Part(4, "normal", 0.0, 1.0).rows(0, 7, fresh))
        cache.close()
        first = steps


@pytest.mark.parametrize("padding", [None, 7])
def test_ids_count_from_the_end(tmp_path, padding):
    memory = [torch.zeros(65, p.width) for p in PARTS]
    table = TieredTable("item", RowCache(tmp_path, 3000, PARTS, 64, seed=1, memory=[m[:64] for m in memory]), memory, padding)
    given, meant = torch.tensor([[-1, 5], [7, -3000], [7 - 3000, 2999]]), torch.tensor([[2999, 5], [7, 0], [7, 2999]])
    with torch.no_grad():
        table.prefetch(given, 0)
        slots, whole = table.slots(given), _model(1)[0]
        assert torch.equal(memory[0][slots], whole[meant])
        assert torch.equal(slots == table.home, meant == padding if padding else torch.zeros_like(meant, dtype=torch.bool))
        for ids in ([3000], [-3001], [-1, 3000]):
            with pytest.raises(IndexError, match=rf"id {ids[-1]} is out of range for table 'item' of 3000 rows"):
                table.slots(torch.tensor(ids))
        table.updated()


def test_errors_say_what_and_where(tmp_path):
    cache = RowCache(tmp_path, 3000, PARTS, 64, seed=1)
    with pytest.raises(TierError, match="id 3000 is out of range: the table has 3000 rows"):
        cache.fetch(torch.tensor([1, 3000]))
    with pytest.raises(TierError, match="in use by another process"):
        RowCache(tmp_path, 3000, PARTS, 64, seed=1)
    before = cache.read(torch.arange(3000))
    held = [cache.fetch(torch.arange(16 * k, 16 * k + 16)) for k in range(2)]
    with pytest.raises(TierError, match="the cache is too small: .* in sets of 16 that fill unevenly"):
        cache.fetch(torch.arange(100, 400))
    assert cache.counters().batches == 2 and torch.equal(cache.read(torch.arange(3000)), before)
    for k, (slots, ticket) in enumerate(held):
        assert torch.equal(cache.parts[0][slots], before[16 * k : 16 * k + 16])
        cache.release(ticket)
    with pytest.raises(TierError, match="not held"):
        cache.release(99)
    cache.fetch(torch.arange(30))
    cache.close()
    with pytest.raises(TierError, match="closed"):
        cache.fetch(torch.tensor([1]))
    with pytest.raises(TierError, match="holds another table"):
        RowCache(tmp_path, 3000, PARTS, 64, seed=2)
    with pytest.raises(TierError, match="holds another table|truncated"):
        RowCache(tmp_path, 4000, PARTS, 64, seed=1)
    rows = tmp_path / "rows.dat"
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-8])
    with pytest.raises(TierError, match="truncated"):
        RowCache(tmp_path, 3000, PARTS, 64, seed=1)
    rows.write_bytes(b"x" * len(whole))
    with pytest.raises(TierError, match="not a file of rows"):
        RowCache(tmp_path, 3000, PARTS, 64, seed=1)
    rows.write_bytes(whole[:20] + b"x" + whole[21:])
    with pytest.raises(TierError, match="damaged header"):
        RowCache(tmp_path, 3000, PARTS, 64, seed=1)
    with pytest.raises(TierError, match="does not exist"):
        RowCache(tmp_path / "other", 3000, PARTS, 64, seed=1, create=False)
    with pytest.raises(ValueError, match="slots >= 16"):
        RowCache(tmp_path / "other", 3000, PARTS, 4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="NOT TESTED: there is no fork")
def test_a_fork_is_refused(tmp_path):
    """Both would write to one journal; and where the child ends, its parent goes on."""
    run = subprocess.run([sys.executable, "-c", _FORK, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(Path(tablewright.__file__).parent.parent)}, capture_output=True, text=True)
    assert run.returncode == 0 and f"{tmp_path} is written by process" in run.stdout, run.stdout + run.stderr


_FORK = """
import os, sys
import torch
from tablewright.kernels.tiers import Part, RowCache, TierError

cache = RowCache(sys.argv[1], 300, [Part(4)], 32)
cache.write(torch.arange(9), torch.ones(9, 4))
if not (child := os.fork()):
    refused = 0
    for call in (lambda: cache.fetch(torch.arange(3)), lambda: cache.write(torch.arange(3), torch.zeros(3, 4)), cache.snapshot):
        try:
            call()
        except TierError as error:
            refused, said = refused + 1, error
    print(said, flush=True)
    cache.close()
    os._exit(3 - refused)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
cache.snapshot()
assert torch.equal(cache.read(torch.arange(9)), torch.ones(9, 4))
"""


def test_from_several_threads(tmp_path):
    """Batches fetched by one thread while another trains: every increment counts."""
    cache = RowCache(tmp_path, 3000, [Part(1)], 1024)
    counts = torch.zeros(3000)
    train = threading.Lock()

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            ids = torch.unique(torch.randint(0, 3000, (64,), generator=generator))
            slots, ticket = cache.fetch(ids)
            with train:
                cache.parts[0][slots] += 1
                counts[ids] += 1
            cache.release(ticket)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert torch.equal(cache.read(torch.arange(3000))[:, 0], counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=10_000_000)
    parser.add_argument("--kills", type=int, default=50)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made, read, written, snapshots, crashes = _against_a_dict(Path(folder) / "rows", asked.operations)
        print(f"{made:,} made, {read:,} read again, {written:,} written back, {snapshots} snapshots, {crashes} crashes: no update was lost")
        test_after_kill_the_last_snapshot_is_there(Path(folder) / "killed", asked.kills)
        print(f"kill -9 at {asked.kills} moments: no snapshot was torn")
