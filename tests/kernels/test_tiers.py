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
    journal = (tmp_path / "journal.dat").read_bytes()
    cache.close()
    (tmp_path / "journal.dat").write_bytes(journal)
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


def test_a_journal_keeps_to_what_is_needed(tmp_path):
    """Rows that leave again and again: the journal gives back what is out of date, loses nothing, and a snapshot with its holes is whole."""
    rows, width = 20_000, 64  # so that its oldest part is on the disk
    cache, whole, generator = RowCache(tmp_path, rows, [Part(width)], 2048), torch.zeros(20_000), torch.Generator().manual_seed(0)
    for step in range(1, 1500):
        ids = torch.unique((torch.rand(300, generator=generator) ** 2 * rows).long())  # some often, some seldom
        slots, ticket = cache.fetch(ids)
        cache.parts[0][slots] = whole[ids, None] = torch.full((len(ids), 1), float(step))
        cache.release(ticket)
    journal = (tmp_path / "journal.dat").stat()
    entry = 16 + 4 * width
    assert cache.counters().written > 150_000 and journal.st_size > 150_000 * entry  # its end moves on
    if sys.platform == "linux":
        assert journal.st_blocks * 512 < (2 * rows + 65 * 1024 + 4096) * entry
    assert torch.equal(cache.read(torch.arange(rows))[:, 3], whole)
    cache.prepare()
    cache.close()  # as if it had died with the snapshot complete
    prepared = (tmp_path / "journal.dat").read_bytes()
    again = RowCache(tmp_path, rows, [Part(width)], 2048)
    assert again.counters().generation == 1 and torch.equal(again.read(torch.arange(rows))[:, 3], whole)
    again.close()
    (tmp_path / "COMMIT").write_bytes(b"".join(n.to_bytes(8, "little") for n in (2, len(prepared), len(torch.nonzero(whole)))))
    (tmp_path / "journal.dat").write_bytes(prepared[: -5 * entry] + bytes(5 * entry))  # five rows became a hole
    with pytest.raises(TierError, match="journal.dat is damaged: it holds .* rows, and COMMIT says"):
        RowCache(tmp_path, rows, [Part(width)], 2048)


def _with_far_rows(folder, slots):
    """A cache of rows of 4 KiB whose journal is larger than what of it stays in the system's memory, and what they are: the oldest are read from the disk."""
    cache, whole = RowCache(folder, 10_000, [Part(1000), Part(24)], slots), torch.zeros(10_000)
    for first in range(0, 8_000, 1000):
        rows = torch.arange(first, first + 1000)
        cache.write(rows, rows[:, None].float().expand(1000, 1000))
        whole[rows] = rows.float()
    return cache, whole


def test_rows_are_left_to_the_disk_and_come_back(tmp_path):
    cache, whole = _with_far_rows(tmp_path, 2048)
    for step in range(30):
        ids = torch.cat([torch.arange(step, 300, 30) * 10, torch.randint(0, 10_000, (300,), generator=torch.Generator().manual_seed(step))])
        slots, ticket = cache.fetch(ids)
        assert torch.equal(cache.parts[0][slots], whole[ids, None].expand(-1, 1000)) and not cache.parts[1][slots].any()
        cache.parts[0][slots] = whole[ids, None] = -1.0 - step
        cache.release(ticket)
    ids = torch.arange(0, 10_000, 7)
    assert torch.equal(cache.read(ids)[:, 999], whole[ids])


def test_a_row_that_leaves_and_returns_in_one_batch_is_its_newest(tmp_path):
    """The disk was asked for what it was before."""
    cache, _ = _with_far_rows(tmp_path, 16)
    slots, ticket = cache.fetch(torch.tensor([5]))  # the journal's place of row 5 is on the disk
    cache.parts[0][slots] = 55.0
    cache.release(ticket)
    cache.release(cache.fetch(torch.arange(100, 115))[1])  # all slots are taken now, and row 5 is the oldest
    slots, ticket = cache.fetch(torch.tensor([200, 5]))
    assert cache.parts[0][slots][:, 0].tolist() == [200.0, 55.0]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="NOT TESTED: memory is read from /proc")
def test_many_short_rows_from_the_disk_take_little_memory(tmp_path):
    """Each of them is read with the blocks around it, at the same time as others."""
    cache, rows = RowCache(tmp_path, 120_000, [Part(60)], 70_000), torch.arange(120_000)
    cache.write(rows, rows[:, None].float().expand(-1, 60))
    ids, before = rows[:40_000], _resident()
    slots, ticket = cache.fetch(ids, train=False)
    assert _resident() - before < 110 << 20  # of which the rows are 10 MB
    assert torch.equal(cache.parts[0][slots][:, 59], ids.float())


def _resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("row", [3, 7_990], ids=["on the disk", "in memory"])
def test_a_damaged_row_of_the_journal_is_named(tmp_path, row):
    cache, _ = _with_far_rows(tmp_path, 512)
    entry = 16 + 4096
    with open(tmp_path / "journal.dat", "r+b") as journal:
        journal.seek(row * entry + 1000)
        journal.write(b"?")
    with pytest.raises(TierError, match=f"journal.dat is damaged at byte {row * entry}: go back to the last snapshot"):
        cache.fetch(torch.tensor([row + 1, row]))
    assert cache.read(torch.tensor([row + 1]))[0, 0] == row + 1


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


def test_a_full_disk_loses_no_row(tmp_path):
    """A row that cannot be written back stays in the cache, and the one that wanted its slot does not come."""
    run = subprocess.run([sys.executable, "-c", _FULL_DISK, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(Path(tablewright.__file__).parent.parent)}, capture_output=True, text=True)
    assert run.returncode == 0 and "cannot write" in run.stdout, run.stdout + run.stderr


_FULL_DISK = """
import resource, signal, sys
import torch
from tablewright.kernels.tiers import Part, RowCache, TierError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache = RowCache(sys.argv[1], 300, [Part(4)], 32)
whole = torch.zeros(300, 4)
failed = None
for first in range(0, 300, 10):
    if first == 60:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))  # as if the disk were full
    ids = torch.arange(first, first + 10)
    try:
        slots, ticket = cache.fetch(ids)
    except TierError as error:
        failed = error
        break
    cache.parts[0][slots] = whole[ids] = torch.rand(10, 4)
    cache.release(ticket)
assert failed is not None and "journal.dat" in str(failed)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.equal(cache.read(torch.arange(300)), whole)
cache.snapshot()
assert torch.equal(cache.read(torch.arange(300)), whole)
print(failed)
"""


def test_errors_say_what_and_where(tmp_path):
    cache = RowCache(tmp_path, 3000, PARTS, 64, seed=1)
    with pytest.raises(TierError, match="id 3000 is out of range: the table has 3000 rows"):
        cache.fetch(torch.tensor([1, 3000]))
    with pytest.raises(TierError, match="in use by another process"):
        RowCache(tmp_path, 3000, PARTS, 64, seed=1)
    before = cache.read(torch.arange(3000))
    held = [cache.fetch(torch.arange(16 * k, 16 * k + 16)) for k in range(2)]
    with pytest.raises(TierError, match="the cache is too small"):
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
