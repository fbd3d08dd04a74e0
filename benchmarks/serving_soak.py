"""Requests from several threads while versions flip and a replica is killed: is every answer right, and of one version?

``python benchmarks/serving_soak.py [--requests 100000] [--threads 4] [--store flight|local] [--out FILE]``: a command by hand, minutes long.

The two versions' tables and dense parts carry the number of their version, so an answer tells which rows and which dense part made it.
At a third and two thirds of the requests the version flips; at half, one replica is killed and its node goes on with the other. Errors may
happen within a second of that. The report says what every error was and when, for how long this process did not run at all (a machine that
is busy elsewhere), and whether each bar holds; the exit status is 1 where one does not. 100,000 requests take about 90 s alone.
"""
from __future__ import annotations

import argparse
import os
import re
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import tablewright as tw
import torch
from torch import nn

sys.path.insert(0, str(Path(tw.__file__).resolve().parent / "tests" / "rewriter"))
from serving_nodes import address, shard_servers  # noqa: E402

ROWS, DIM, TABLES, BATCH = 5000, 16, 8, 16
WINDOW = 1.0  # seconds after the kill in which errors may happen


class Tagged(nn.Module):
    """sum of all looked-up values, times a weight, plus a bias: row tag ``t`` and dense tag ``u`` give ``TABLES * DIM * t * u``."""

    def __init__(self, tag: float):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ROWS, DIM) for _ in range(TABLES))
        self.last = nn.Linear(TABLES * DIM, 1)
        for parameter in self.parameters():
            nn.init.constant_(parameter, tag)
        nn.init.zeros_(self.last.bias)

    def forward(self, ids):
        return self.last(torch.cat([table(ids[:, k]) for k, table in enumerate(self.tables)], 1)).squeeze(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--store", choices=("flight", "local"), default="flight")
    parser.add_argument("--deadline-ms", type=float, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / "tagged"
        for tag in (2, 1):
            tw.export_serving(Tagged(tag), (torch.randint(ROWS, (4, TABLES)),), home, version=f"v{tag}", shards=2)
        with shard_servers(home, 2, replicas=2) as nodes:
            report = soak(home, nodes, options)
    report, held = report
    print(report)
    if options.out:
        options.out.write_text(f"# Soak\n\n`{' '.join(['python', 'benchmarks/serving_soak.py', *sys.argv[1:]])}`\n\n{report}\n")
    sys.exit(not held)


def soak(home: Path, nodes, options: argparse.Namespace) -> tuple[str, bool]:
    """The report, and whether all bars hold."""
    p = tw.load_serving(home, address(nodes) if options.store == "flight" else "local", deadline_ms=options.deadline_ms)
    right = {f"v{tag}": TABLES * DIM * tag * tag for tag in (1, 2)}
    outcomes: Counter[str] = Counter()
    errors: list[tuple[float, str]] = []
    times: list[list[float]] = [[] for _ in range(options.threads)]
    counter, lock = iter(range(options.requests)), threading.Lock()
    done = [0]

    def ask(which: int) -> None:
        rng = np.random.default_rng(which)
        while True:
            with lock:
                number = next(counter, None)
                if number is None:
                    return
                done[0] = number
            ids = np.minimum(rng.zipf(1.3, (BATCH, TABLES)) - 1, ROWS - 1)
            started = time.perf_counter()
            try:
                result, version = p.answer({"ids": ids})
            except tw.ServingError as error:
                with lock:
                    outcomes["error"] += 1
                    errors.append((time.monotonic(), f"{type(error).__name__}: {error}"))
                continue
            times[which].append(time.perf_counter() - started)
            value = set(result.tolist())
            kind = "right" if value == {right[version.manifest.version]} else "mixed or wrong"
            with lock:
                outcomes[kind] += 1

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(options.threads)]
    memory, stalls, started = [], [0.0], time.monotonic()
    for thread in threads:
        thread.start()
    killed = None
    flips: list[str] = []
    while any(thread.is_alive() for thread in threads):
        part = done[0] / options.requests
        if len(flips) == 0 and part > 1 / 3:
            flips.append(p.reload("v2"))
        if killed is None and part > 1 / 2 and options.store == "flight":
            nodes[0][p._version.store.store._preferred[0]].kill()
            killed = time.monotonic()
        if len(flips) == 1 and part > 2 / 3:
            flips.append(p.rollback())
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)
        slept = time.monotonic()
        time.sleep(0.2)
        stalls.append(time.monotonic() - slept - 0.2)
    seconds = time.monotonic() - started
    every = sorted(t * 1e3 for each in times for t in each)
    inside = [at - killed for at, _ in errors if killed is not None and 0 <= at - killed <= WINDOW]
    median, p99 = every[len(every) // 2], every[int(len(every) * 0.99)]
    store = p.stats()["store"]
    p.close()
    tenth = max(1, len(memory) // 10)
    outside = len(errors) - len(inside)
    kinds = Counter((f"{'in' if killed is not None and 0 <= at - killed <= WINDOW else 'out'}side", re.sub(r"\d+", "N", text)[:160]) for at, text in errors)
    first_out = [f"{at - started:.1f} s" for at, _ in errors if killed is None or not 0 <= at - killed <= WINDOW][:10]
    bars = {"0 wrong, 0 mixed": not outcomes["mixed or wrong"], f"errors only within {WINDOW:.0f} s of the kill": not outside,
            "p99 within 3 medians": p99 <= 3 * median, "memory within 5%": memory[-1] <= 1.05 * memory[tenth]}  # fmt: skip
    return "\n".join([
        f"{options.requests:,} requests of {BATCH} rows x {TABLES} tables from {options.threads} threads, {options.store} store, {seconds:.0f} s; "
        f"flips to {', '.join(flips)}; one replica {'killed' if killed else 'not killed'}.",
        f"right {outcomes['right']:,}, mixed or wrong {outcomes['mixed or wrong']:,}, errors {len(errors):,}: {len(inside)} within {WINDOW:.0f} s of the kill "
        f"(the last {max(inside, default=0.0):.2f} s after it), {outside} outside; failovers {store.get('failovers', 0)}.",
        *(f"  {count} {where} the window: {text}" for (where, text), count in kinds.most_common()),
        *([f"  the first outside: {', '.join(first_out)}; the kill: {killed - started:.1f} s" if killed else ""] if first_out else []),
        f"median {median:.2f} ms, p99 {p99:.2f} ms = {p99 / median:.1f} medians, longest {every[-1]:.1f} ms.",
        f"this process was not run for {sum(max(0.0, s) for s in stalls):.1f} s in all, {max(stalls):.2f} s at most (load {os.getloadavg()[0]:.1f}).",
        f"memory of the client {memory[tenth]:.0f} MiB after a tenth, {memory[-1]:.0f} MiB at the end, {max(memory):.0f} MiB at most.",
        "bars: " + "; ".join(f"{name}: {'yes' if held else 'NO'}" for name, held in bars.items()) + ".",
    ]), all(bars.values())  # fmt: skip


if __name__ == "__main__":
    main()
