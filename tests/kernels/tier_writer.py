"""A process that trains rows and takes snapshots until it is killed: row r of step s becomes s + r / 1000. Prints each snapshot's step."""
from __future__ import annotations

import sys

import torch
from tablewright.kernels.tiers import Part, RowCache

ROWS, SLOTS = 5000, 256


def opened(folder):
    return RowCache(folder, ROWS, [Part(4, "normal", 0.0, 1.0), Part(1)], SLOTS, seed=7)


def ids_of(step):
    return torch.randint(0, ROWS, (48,), generator=torch.Generator().manual_seed(step))


if __name__ == "__main__":
    cache = opened(sys.argv[1])
    for step in range(int(sys.argv[2]), 10**9):
        ids = ids_of(step)
        slots, ticket = cache.fetch(ids)
        cache.parts[0][slots] = (step + ids / 1000).float()[:, None]
        cache.parts[1][slots] = float(step)
        cache.release(ticket)
        if step % 5 == 4:
            cache.snapshot()
            print(step, flush=True)
