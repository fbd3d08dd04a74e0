"""What a table with dynamic ids must do, in Python dicts; by hand, millions of random operations on both:

    python tests/kernels/id_model.py --lookups 10000000
"""
from __future__ import annotations

import argparse
import heapq
import time

import torch
from tablewright.kernels.dynamic_ids import IdMap
from tablewright.kernels.dynamic_ids.table import DynamicTable
from tablewright.kernels.tiers import Part

PARTS = (Part(2, "uniform", -0.5, 0.5), Part(1, "constant", 0.1))


class DictModel:
    """``rows``: id -> its row as a list of numbers; ``order``: id -> what it is evicted by, smallest first."""

    def __init__(self, capacity, admit_after, policy):
        self.capacity, self.admit_after, self.policy = capacity, admit_after, policy
        self.rows, self.order, self.uses, self.held = {}, {}, {}, []
        self.heap = []  # (order, id), also of orders that ids no more have
        self.seen, self.older = {}, {}
        self.tick = self.evicted = self.forgotten = 0

    def look_up(self, ids, started, admit=True):
        """Admit and evict for one call; ``started(id)`` makes a new row. Returns the ids that it evicts, None where there is no room (then
        nothing changed)."""
        present = dict.fromkeys(i for i in ids if i in self.rows)
        if not admit:
            self.held.append(set(present))
            return []
        found = {}
        for i in ids:
            if i not in self.rows:
                found[i] = found.get(i, 0) + 1
        counts = {i: self.seen.get(i, 0) + self.older.get(i, 0) + n for i, n in found.items()}
        fresh = [i for i, n in counts.items() if n >= self.admit_after]
        pinned = set(present).union(*self.held)
        if len(fresh) > self.capacity - len(pinned):
            return None
        for i in present:
            self._touch(i)
        gone = []
        need = max(0, len(self.rows) + len(fresh) - self.capacity)
        passed = []
        while len(gone) < need:
            order, i = heapq.heappop(self.heap)
            if self.order.get(i) != order:
                continue
            if i in pinned:
                passed.append((order, i))
            else:
                gone.append(i)
        for each in passed:
            heapq.heappush(self.heap, each)
        for i in gone:
            del self.rows[i], self.order[i], self.uses[i]
        self.evicted += len(gone)
        for i, n in counts.items():
            self.older.pop(i, None)
            if n < self.admit_after:
                self.seen[i] = n
                continue
            self.seen.pop(i, None)
            self.rows[i] = started(i)
            self.uses[i] = 0
            self.order[i] = None
            self._touch(i, new=True)
        if len(self.seen) >= self.capacity:
            self.forgotten += len(self.older)
            self.seen, self.older = {}, self.seen
        self.held.append({*present, *fresh})
        return gone

    def _touch(self, i, new=False):
        self.uses[i] += 1
        self.tick += 1
        if self.policy == "lru" or new:
            self.order[i] = (0 if self.policy != "lfu" else self.uses[i], self.tick)
        elif self.policy == "lfu":
            self.order[i] = (self.uses[i], self.tick)
        else:
            return
        heapq.heappush(self.heap, (self.order[i], i))


class Pair:
    """A table and its model, driven alike. Every lookup compares all rows that it reads; every update sets each row to its number."""

    def __init__(self, capacity, admit_after, policy, padding=None):
        self.table = DynamicTable("t", IdMap(capacity, admit_after, policy), PARTS, seed=7, default=-9.0, padding=padding)
        self.model = DictModel(capacity, admit_after, policy)
        self.tickets, self.padding, self.updates, self.calls = [], padding, 0, 0

    def started(self, i):
        one = torch.tensor([i])
        return [p.rows(n, 7, one)[0].tolist() for n, p in enumerate(PARTS)]

    def look_up(self, ids, admit=True, update=True):
        """Returns whether there was room."""
        table, model, home = self.table, self.model, self.table.home
        known = [i for i in ids.tolist() if i != self.padding]
        starts = self._starts(ids) if admit else {}
        gone = model.look_up(known, starts.__getitem__, admit)
        before = table.counters() if gone is None else None
        try:
            slots, fresh, places, ticket, _ = table.ids.fetch(ids, admit=admit, leave_out=self.padding)
        except RuntimeError as error:
            assert gone is None and "give `capacity` more rows" in str(error), error
            assert table.counters() == before
            return False
        assert gone is not None
        if len(fresh):
            table._start(fresh, places)
        self.tickets.append(ticket)
        wanted = [[-9.0, -9.0] if i not in model.rows else model.rows[i][0] for i in ids.tolist()]
        if self.padding is not None:
            wanted = [[0.0, 0.0] if i == self.padding else row for i, row in zip(ids.tolist(), wanted)]
        assert torch.equal(table.memory[0][slots], torch.tensor(wanted).view(*ids.shape, 2))
        if update and admit:
            rows = torch.unique(slots)
            rows = rows[rows < home]
            self.calls += 1
            for n, part in enumerate(table.memory):
                part[rows] = self.calls + n / 2  # exact in float32
            row = [[self.calls, self.calls], [self.calls + 0.5]]
            for i in dict.fromkeys(known):
                if i in model.rows:
                    model.rows[i] = row
                    self.updates += 1
        return True

    def _starts(self, ids):
        values = [p.rows(n, 7, ids).tolist() for n, p in enumerate(PARTS)]
        return {i: [values[0][k], values[1][k]] for k, i in enumerate(ids.tolist())}

    def release(self, number=0):
        self.table.ids.release(self.tickets.pop(number))
        self.model.held.pop(number)

    def check_all(self):
        """Both hold the same ids, rows, uses, counts, and would evict in the same order."""
        model = self.model
        state = self.table.state()
        ids = state["ids"].tolist()
        assert ids == sorted(model.rows, key=model.order.__getitem__)
        for part in range(2):
            found = self.table.export(part)
            assert found[0].tolist() == ids
            expected = torch.tensor([model.rows[i][part] for i in ids]).view(len(ids), PARTS[part].width)
            assert torch.equal(found[1], expected)
        assert state["uses"].tolist() == [model.uses[i] for i in ids]
        waiting = [(i, n, 0) for i, n in model.seen.items()] + [(i, n, 1) for i, n in model.older.items()]
        assert [tuple(w) for w in state["waiting"].tolist()] == sorted(waiting)
        found = self.table.counters()
        assert (found.rows, found.evicted, found.forgotten) == (len(model.rows), model.evicted, model.forgotten)


def soak(lookups, capacity, vocabulary, batch=2048):
    """Random calls for each policy until ``lookups`` ids were looked up in all; prints what happened."""
    generator = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    for policy in ("lru", "lfu", "age"):
        pair, done = Pair(capacity, 2, policy), 0
        while done < lookups // 3:
            ids = (torch.rand(batch, generator=generator) ** 3 * vocabulary).long() * 2654435761 - 2**62
            assert pair.look_up(ids)
            done += batch
            if len(pair.tickets) > 2:
                pair.release()
        pair.check_all()
        c = pair.table.counters()
        print(f"{policy}: {done:,} lookups, {c.admitted:,} inserts, {c.evicted:,} evictions, {pair.updates:,} updates, {c.rows:,} rows at the end: 0 differ", flush=True)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--lookups", type=int, default=10_000_000)
    chosen = options.parse_args()
    soak(chosen.lookups, 20_000, 200_000)
