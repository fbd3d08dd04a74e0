"""Ids/s from 64-bit ids to slots: the map of dynamic ids beside a Python dict and beside torch.unique, and a training step beside a plain table.

Ids are Zipf-distributed (exponent 1.05) or uniform over ``--vocabulary`` values spread over 64 bits; ``--known`` of them were admitted before.
All sides get the same batches of ``--batch`` ids in turn, one thread. ``hits``: every id has a slot. ``full``: the map is full, so that each new id
evicts one. The dict gives slots to new ids and evicts nothing; torch.unique only sorts a batch. Prints a table for benchmarks/results/.
"""
from __future__ import annotations

import argparse
import statistics
import time

import numpy
import tablewright as tw
import torch
from tablewright.kernels.dynamic_ids import IdMap
from tiers_cpu import Model, step, zipf

SPREAD = 0x9E3779B97F4A7C15


def spread(values: numpy.ndarray) -> torch.Tensor:
    """Different numbers as different 64-bit ids."""
    return torch.from_numpy((values.astype(numpy.uint64) * numpy.uint64(SPREAD)).view(numpy.int64))


def seconds(call, *arguments) -> float:
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def look_up(ids_map: IdMap, ids: torch.Tensor) -> None:
    ids_map.release(ids_map.fetch(ids)[3])


def in_dict(slots: dict, ids: torch.Tensor) -> torch.Tensor:
    return torch.tensor([slots.setdefault(i, len(slots)) for i in ids.tolist()])


def maps(options, chance) -> None:
    known = options.known
    print(f"\n{options.batch:,} ids a call, {known:,} of {options.vocabulary:,} known; millions of ids/s (medians of {options.calls} calls)\n")
    print("| | map, hits | map, full, lru | lfu | age | Python dict | torch.unique |\n|---|---|---|---|---|---|---|")
    for kind in ("Zipf 1.05", "uniform"):
        hits = IdMap(known)
        full = [IdMap(known, 1, policy) for policy in ("lru", "lfu", "age")]
        for first in range(0, known, 1 << 16):
            some = spread(numpy.arange(first, min(first + (1 << 16), known)))
            for each in (hits, *full):
                look_up(each, some)
        slots = {i: n for n, i in enumerate(spread(numpy.arange(known)).tolist())}
        taken: list[list[float]] = [[] for _ in range(6)]
        for _ in range(options.calls):
            every, few = (
                spread(zipf(options.batch, rows, 1.05, chance) if kind != "uniform" else chance.integers(0, rows, options.batch))
                for rows in (options.vocabulary, known)
            )
            sides = [(look_up, hits, few), *((look_up, each, every) for each in full), (in_dict, slots, every), (torch.unique, every, True, True)]
            for mine, (call, *arguments) in zip(taken, sides):
                mine.append(seconds(call, *arguments))
        rates = [f"{options.batch / statistics.median(mine) / 1e6:.1f}" for mine in taken]
        print(f"| {kind} | " + " | ".join(rates) + " |", flush=True)


def steps(options, chance) -> None:
    rows, dim = options.known, 64
    sides = []
    for ids in ({}, {"ids": {"dynamic": True, "capacity": rows}}):
        model = Model(rows, dim, 64, None)
        table = {"embedding_optimizer": {"adagrad": {"lr": 0.01, "in_backward": True}}, **ids}
        sample = (torch.zeros(2048, 10, dtype=torch.int64),)
        opt = tw.optimize(model, tw.Plan.from_dict({"version": 1, "tables": {"item": table}}), sample_inputs=sample)
        sides.append((opt, torch.optim.SGD(opt.dense_parameters(), lr=0.01), []))
    for number in range(options.calls):
        ranks = zipf(2048 * 10, rows, 1.05, chance)
        for (opt, dense, taken), ids in zip(sides, (torch.from_numpy(ranks), spread(ranks))):
            spent = seconds(step, opt, dense, ids.view(2048, 10), torch.zeros(2048))
            if number >= options.calls // 2:
                taken.append(spent)
    plain, dynamic = (statistics.median(taken) * 1e3 for *_, taken in sides)
    print(f"\ntraining step, one table x {dim}, AdaGrad in the backward, Zipf 1.05, batch 2048 x 10: plain {plain:.2f} ms, dynamic ids {dynamic:.2f} ms ({plain / dynamic:.2f})")


if __name__ == "__main__":
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--batch", type=int, default=20_480)
    given.add_argument("--known", type=int, default=1_000_000)
    given.add_argument("--vocabulary", type=int, default=10_000_000)
    given.add_argument("--calls", type=int, default=60)
    chosen = given.parse_args()
    torch.set_num_threads(1)
    generator = numpy.random.default_rng(0)
    maps(chosen, generator)
    steps(chosen, generator)
