"""The journal of a file of rows: its newest part in memory, the rest on the disk; what cannot be read or written is named and loses nothing."""
from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tablewright
import torch
from tablewright.kernels import tiers
from tablewright.kernels.tiers import Part, RowCache, TierError

pytestmark = pytest.mark.skipif(bool(tiers.available()), reason=f"NOT TESTED: {tiers.available()}")


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
        assert journal.st_blocks * 512 < (2 * rows + 65 * 1024 + 4096) * entry + (9 << 20)  # what is allocated ahead of it
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
    """A cache of rows of 4 KiB whose journal is larger than what of it stays in memory, and what they are: the oldest are read from the disk."""
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


def _damage(folder, row):
    with open(folder / "journal.dat", "r+b") as journal:
        journal.seek(row * (16 + 4096) + 1000)
        journal.write(b"?")
    return f"journal.dat is damaged at byte {row * (16 + 4096)}: go back to the last snapshot"


def test_a_damaged_row_of_the_journal_is_named(tmp_path):
    cache, _ = _with_far_rows(tmp_path, 512)
    said = _damage(tmp_path, 3)
    for read in (cache.fetch, cache.read):
        with pytest.raises(TierError, match=said):
            read(torch.tensor([4, 3]))
    assert cache.read(torch.tensor([4]))[0, 0] == 4 and cache.counters().batches == 0


def test_another_row_where_one_was_looked_for_is_named(tmp_path):
    """Whole, but not the one: it is never handed over, whether the disk was asked ahead or not."""
    cache, _ = _with_far_rows(tmp_path, 512)
    entry = 16 + 4096
    with open(tmp_path / "journal.dat", "r+b") as journal:
        journal.seek(7 * entry)
        other = journal.read(entry)
        journal.seek(3 * entry)
        journal.write(other)
    for read in (cache.fetch, cache.read):
        with pytest.raises(TierError, match=f"journal.dat has row 7 at byte {3 * entry}, where row 3 was looked for: go back to the last snapshot"):
            read(torch.tensor([4, 3]))
    slots, ticket = cache.fetch(torch.tensor([4, 7]))
    assert cache.parts[0][slots, 0].tolist() == [4.0, 7.0] and cache.counters().batches == 1


def test_rows_that_come_later_are_those_that_were_asked_for(tmp_path):
    """Two batches ahead of the one that trains, rows from the disk among them; some batches are given up before their rows came."""
    cache, whole = _with_far_rows(tmp_path, 2048)
    generator, ahead = torch.Generator().manual_seed(0), []
    for step in range(60):
        ids = torch.cat([torch.arange(step % 30, 300, 30) * 10, torch.randint(0, 10_000, (300,), generator=generator)]).unique()
        ahead.append((ids, *cache.fetch(ids, later=True)))
        if step % 7 == 6:
            cache.release(ahead.pop()[2])
        if len(ahead) > 2 or step % 11 == 5:
            ids, slots, ticket = ahead.pop(0)
            cache.complete(ticket)
            assert torch.equal(cache.parts[0][slots], whole[ids, None].expand(-1, 1000)) and not cache.parts[1][slots].any()
            cache.parts[0][slots] = whole[ids, None] = -1.0 - step
            cache.release(ticket)
    assert cache.counters().written > 4000
    ids = torch.arange(0, 10_000, 7)
    assert torch.equal(cache.read(ids)[:, 999], whole[ids])
    cache.snapshot()
    assert torch.equal(cache.read(ids)[:, 999], whole[ids])


def test_more_rows_than_the_disk_takes_at_once_come_to_two_batches(tmp_path):
    """Hundreds of reads of each are still to begin when the next one asks; one batch is given up before its rows came."""
    cache, whole = _with_far_rows(tmp_path, 8192)
    batches = [torch.arange(first, 6000, 5) for first in range(5)]
    ahead = []
    for number, ids in enumerate(batches):
        ahead.append((ids, *cache.fetch(ids, later=True)))
        if number == 1:
            cache.release(ahead.pop()[2])
        if len(ahead) > 1:
            ids, slots, ticket = ahead.pop(0)
            cache.complete(ticket)
            assert torch.equal(cache.parts[0][slots], whole[ids, None].expand(-1, 1000))
            cache.release(ticket)
    for part in (cache.read(torch.cat(batches)), cache.parts[0][cache.fetch(batches[1])[0]]):
        assert torch.equal(part[:, 500], part[:, 0])
    assert torch.equal(cache.read(torch.cat(batches))[:, 0], whole[torch.cat(batches)])


def test_a_batch_whose_rows_cannot_be_read_later_says_so(tmp_path):
    """And so does the next one where it wants one of those rows; what is not of them is as it was."""
    cache, _ = _with_far_rows(tmp_path, 512)
    said = _damage(tmp_path, 3)
    tickets = [cache.fetch(torch.tensor(ids), later=True)[1] for ids in ([3, 4], [4, 5], [6, 7])]
    for ticket in tickets[:2]:
        with pytest.raises(TierError, match=said):
            cache.complete(ticket)
    cache.complete(tickets[2])
    for ticket in tickets:
        cache.release(ticket)
    slots, ticket = cache.fetch(torch.tensor([4, 5, 6]))
    assert cache.parts[0][slots, 0].tolist() == [4.0, 5.0, 6.0] and cache.counters().batches == 1


def test_a_full_disk_loses_no_row(tmp_path):
    """A row that cannot be written back stays in the cache, and the one that wanted its slot does not come."""
    run = subprocess.run([sys.executable, "-c", _FULL_DISK, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(Path(tablewright.__file__).parent.parent)}, capture_output=True, text=True)
    assert run.returncode == 0 and "cannot write" in run.stdout, run.stdout + run.stderr


_FULL_DISK = """
import resource, signal, sys
import torch
from tablewright.kernels.tiers import Part, RowCache, TierError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache = RowCache(sys.argv[1], 9000, [Part(1000)], 32)
whole = torch.zeros(9000, 1000)
failed = None
for first in range(0, 9000, 10):
    if first == 2000:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, resource.RLIM_INFINITY))  # as if the disk were full
    ids = torch.arange(first, first + 10)
    try:
        slots, ticket = cache.fetch(ids)
    except TierError as error:
        failed = error
        break
    cache.parts[0][slots] = whole[ids] = torch.rand(10, 1000)
    cache.release(ticket)
assert failed is not None and "journal.dat" in str(failed)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.equal(cache.read(torch.arange(9000)), whole)
cache.snapshot()
assert torch.equal(cache.read(torch.arange(9000)), whole)
print(failed)
"""


def test_a_fetch_that_fails_leaves_the_reads_of_the_batch_before_alone(tmp_path):
    """The rows of a batch that are still to come are its own, whatever fails or is asked for meanwhile."""
    cache, whole = _with_far_rows(tmp_path, 512)
    move = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64, ctypes.c_void_p] * 2, ctypes.c_void_p, ctypes.c_void_p)(lambda *_: 1)
    first, second, third = (torch.arange(start, start + 40) for start in (100, 300, 500))
    slots, ticket = cache.fetch(first, later=True)
    into = torch.empty_like(second)
    with pytest.raises(TierError, match="could not be moved"):
        cache._call("fetch", second.data_ptr(), 40, into.data_ptr(), cache._arrays, True, move, True)
    other, last = cache.fetch(third, later=True)
    cache.complete(ticket), cache.complete(last)
    assert torch.equal(cache.parts[0][slots][:, 0], whole[first]) and torch.equal(cache.parts[0][other][:, 0], whole[third])
    cache.close()
