"""Where the training step of a third-party model goes after ``optimize``, and how much faster it could get at best.

    python benchmarks/zoo_parts.py --repos ~/repos torchfm:DFM fuxictr:GDCN ...

For each model (batch 2048, 100,000 rows a table, AdaGrad, one thread): the time of the plain step (dense gradients) and of the
optimized one by the processor's clock, and the parts of the optimized one by PyTorch's profiler: matrix products, lookups with
their backward, the update of tables, and everything else. The bound is the plain time over the first three parts: the speed-up that
is left if everything else cost nothing. Each operation counts with its least time over several steps, which other programs on the
machine disturb least; the parts of one line belong together, and lines of different runs may differ by what the machine did.
"""
from __future__ import annotations

import argparse
import copy
import importlib
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tablewright.kernels.embedding import row_wise
from tablewright.rewriter import cli, coverage
from torch.profiler import ProfilerActivity, profile, record_function
from zoo import repositories

HERE = Path(__file__).resolve().parent
PRODUCTS = {
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "mkldnn::_linear_pointwise",
    "aten::mkldnn_convolution", "aten::_slow_conv2d_forward", "aten::_slow_conv2d_backward", "aten::mkldnn_rnn_layer",
    "aten::mkldnn_rnn_layer_backward",
}  # fmt: skip
LOOKUPS = {"_Lookup", "_LookupBackward", "_OneLookup", "_OneLookupBackward", "tablewright::embedding_row_sums"}
UPDATE = "update of tables"
STEPS = 8


def least_times(step: Callable[[int], None]) -> Counter[str]:
    """Milliseconds of a step by operation, without what each calls: the least of ``STEPS`` steps at each place."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for i in range(STEPS):
            with record_function("one step"):
                step(i)
    events = sorted(found.events(), key=lambda e: (e.time_range.start, -e.time_range.end))
    runs = []
    for whole in (e for e in events if e.name == "one step"):
        runs.append([e for e in events if e is not whole and whole.time_range.start <= e.time_range.start <= whole.time_range.end])
    length = Counter(map(len, runs)).most_common(1)[0][0]
    times: Counter[str] = Counter()
    for place in zip(*(run for run in runs if len(run) == length)):
        times[place[0].name] += min(e.self_cpu_time_total for e in place) / 1e3  # type: ignore[assignment]
    return times


@contextmanager
def named_update() -> Iterator[None]:
    """Inside, the profiler sees the update of tables under its name."""
    update = row_wise.apply

    def named(work: list) -> None:
        with record_function(UPDATE):
            update(work)

    row_wise.apply = named
    try:
        yield
    finally:
        row_wise.apply = update


def measure(zoo: str, name: str, top: int) -> tuple[float, float]:
    """Prints the line of a model; (speed-up, bound)."""
    models = importlib.import_module(f"zoo_{zoo}").MODELS
    case = cli.case_of(name, models[name], {"rows": 100_000, "sizes": [2048, 2048]})
    case = coverage.Case(coverage.without_dropout(case.model), case.batches, case.kwargs, case.all_batches)
    opt, optim = coverage._optimized(copy.deepcopy(case.model).train(), case, "auto")
    steps = {"ours": coverage._step(opt, optim, case), "plain": coverage._step(*coverage._plain(case, False), case)}
    ms = coverage.interleaved(steps, 1.5, time.process_time)
    with named_update():
        times = least_times(steps["ours"])
    products, lookups = (sum(times[n] for n in names) for names in (PRODUCTS, LOOKUPS))
    rest = sum(times.values()) - products - lookups - times[UPDATE]
    ratio, bound = ms["plain"] / ms["ours"], ms["plain"] / (products + lookups + times[UPDATE])
    row = (ms["plain"], ms["ours"], ratio, products, lookups, times[UPDATE], rest, bound)
    print(f"| {zoo} {name} | " + " | ".join(f"{x:.2f}" for x in row) + " |", flush=True)
    for n, t in times.most_common(top):
        print(f"    {t:8.3f} ms {n}", flush=True)
    return ratio, bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="ZOO:MODEL")
    parser.add_argument("--repos", type=Path, help="folder of cloned repositories")
    parser.add_argument("--top", type=int, default=0, help="also print so many of the dearest operations")
    args = parser.parse_args()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    torch.set_num_threads(1)
    sys.path[:0] = [str(HERE / "zoo_models"), *map(str, repositories(args.repos))]
    print("| model | plain ms | ours ms | faster | products | lookups | update | rest | bound |\n|---|---|---|---|---|---|---|---|---|")
    found = []
    for model in args.models:
        zoo, name = model.split(":")
        try:
            found.append(measure(zoo, name, args.top))
        except Exception as error:  # a model that does not run here costs its line
            print(f"| {zoo} {name} | {type(error).__name__}: {str(error)[:200]} |", flush=True)
    for what, values in zip(("faster", "bound"), zip(*found)):
        print(f"geometric mean, {what}: {math.exp(sum(map(math.log, values)) / len(values)):.2f}")


if __name__ == "__main__":
    main()
