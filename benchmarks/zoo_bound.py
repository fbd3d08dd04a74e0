"""How much faster could the training step of a third-party model get at best, and how much faster is it?

    python benchmarks/zoo_bound.py --repos ~/repos --rows bound.jsonl torchfm:DFM fuxictr:GDCN ...

For each model (batch 2048, 100,000 rows a table, AdaGrad, one thread, the processor's clock): the plain step with dense and with sparse
gradients and the optimized one, taken in turn as ``tablewright coverage --speed`` does. Then two bounds.

"at best": the plain step over a step whose lookups, table updates, element-wise work and Python cost nothing at all, and whose products
run at the core's measured peak of fp32 multiply-adds; or, where that is longer, whose activations are written once and read once at the
memory's measured rate. The products are those of the plain model's step, counted by ``torch.utils.flop_counter``; the activations what
autograd keeps (of the plain or of the optimized step, whichever keeps less), counted only where they are more than the third-level cache.

"as it looks up": the same with the lookups, their backward and the table updates at what they take now (the least of several steps).

Times nothing where a C++ library that a step calls is absent or of another interface than the code.

``--rows FILE`` keeps a JSON line a model: models that it has are not timed again, and the tables are made of all of it.
"""
from __future__ import annotations

import argparse
import copy
import ctypes
import importlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import zoo_parts
from tablewright.rewriter import cli, coverage
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from zoo import ZOOS, available, repositories

HERE = Path(__file__).resolve().parent
LIBRARIES = ("dense.native", "dropout.cpu", "embedding.cpu", "gru.cpu", "interaction.cpu", "max_pool.cpu", "small_products.cpu", "tanh.cpu")  # that a step calls
CACHE = 32 << 20  # bytes of the third-level cache where no file says them
PEAK = """
#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
typedef float lanes __attribute__((vector_size(BYTES)));
long sums(long rounds, float* out) {
    lanes s[12], a = {}, b = {};
    a += 0.999f, b += 0.001f;
    for (int i = 0; i < 12; ++i) s[i] = a * (float)i;
    for (long r = 0; r < rounds; ++r)
        for (int i = 0; i < 12; ++i) s[i] = s[i] * a + b;
    for (int i = 1; i < 12; ++i) s[0] += s[i];
    *out = s[0][0];
    return rounds * 12 * (BYTES / 4) * 2;
}
"""


def unusable() -> list[str]:
    """Why C++ libraries that a step calls are not in use: absent, or built from sources of another interface."""
    modules = (importlib.import_module(f"tablewright.kernels.{name}") for name in LIBRARIES)
    return [f"{module.__name__}: {module._why_not}" for module in modules if module._why_not]


def peak() -> float:
    """Floating-point operations a second of one core, fp32 multiply-adds in registers. Needs a C compiler (``cc``)."""
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "peak.c"), Path(folder, "peak.so")
        source.write_text(PEAK)
        flags = ["-O3", "-march=native", *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []), "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, source, "-o", made], check=True)
        run, result = ctypes.CDLL(str(made)).sums, ctypes.c_float()
        run.argtypes, run.restype, rounds = [ctypes.c_long, ctypes.c_void_p], ctypes.c_long, 5_000_000
        return run(rounds, ctypes.byref(result)) / _least(lambda: run(rounds, ctypes.byref(result)))


def memory_rate() -> float:
    """Bytes a second that one core reads and writes, in a copy larger than any cache."""
    a, b = torch.ones(1 << 26), torch.empty(1 << 26)
    return 2 * a.nbytes / _least(lambda: b.copy_(a))


def _least(run) -> float:
    times = []
    for _ in range(7):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def cache_size() -> int:
    """Bytes of the third-level cache."""
    try:
        return int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return CACHE


def _recurrent(x, w0, w1, w2, w3, hx, cx, *rest, **more) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(w0) + math.prod(w1))


def flops(step) -> int:
    """Of the matrix products, convolutions and recurrent layers of a step."""
    mapping = {torch.ops.aten.mkldnn_rnn_layer: lambda *a, out_shape=None, **k: _recurrent(*a)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        step(0)
    return counter.get_total_flops()


def kept(step, model: torch.nn.Module) -> int:
    """Bytes that autograd keeps for the backward of a step, parameters and buffers aside."""
    stored = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor):
        if tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() not in stored:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = max(found.get(storage.data_ptr(), 0), min(storage.nbytes(), tensor.nbytes))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step(0)
    return sum(found.values())


def measure(zoo: str, name: str, seconds: float, limits: tuple[float, float]) -> dict:
    """The row of a model."""
    models = importlib.import_module(f"zoo_{zoo}").MODELS
    case = cli.case_of(name, models[name], {"rows": 100_000, "sizes": [2048, 2048]})
    case = coverage.Case(coverage.without_dropout(case.model), case.batches, case.kwargs, case.all_batches)
    opt, optim = coverage._optimized(copy.deepcopy(case.model).train(), case, "auto")
    row = {"name": f"{zoo}:{name}", "zoo": zoo, **coverage._speeds(opt, optim, case, "auto", seconds, time.process_time)}
    plain, adagrad = coverage._plain(case, False)
    steps = {"plain": coverage._step(plain, adagrad, case), "ours": coverage._step(opt, optim, case)}
    row["flops"], row["kept"] = flops(steps["plain"]), min(kept(steps["plain"], plain), kept(steps["ours"], opt))
    products, memory = row["flops"] / limits[0] * 1e3, 2e3 * row["kept"] / limits[1]
    row["dense_ms"] = max(products, memory if row["kept"] > cache_size() else 0.0, 1e-3)
    with zoo_parts.named_update():
        times = zoo_parts.least_times(steps["ours"])
    row["lookups_ms"] = sum(times[n] for n in zoo_parts.LOOKUPS) + times[zoo_parts.UPDATE]
    row["best"], row["best_as_is"] = row["plain_ms"] / row["dense_ms"], row["plain_ms"] / (row["dense_ms"] + row["lookups_ms"])
    return row


def mean(values: list[float]) -> float:
    """The geometric one."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


RATIOS = ("dense_ratio", "sparse_ratio", "best", "best_as_is")


def page(rows: list[dict]) -> str:
    """One line a zoo, then one a model, the fastest first."""
    by_zoo = defaultdict(list)
    for row in rows:
        by_zoo[row["zoo"]].append(row)
    text = ["| zoo | timed | of | step vs dense | step vs sparse | at best | as it looks up |", "|---|---|---|---|---|---|---|"]
    of = {zoo: len(available(zoo)) for zoo in ZOOS}
    for zoo, its in [*((z, by_zoo[z]) for z in ZOOS if by_zoo[z]), ("**all**", rows)]:
        means = (f"{mean([r[k] for r in its if k in r]):.2f}" for k in RATIOS)
        text.append(f"| {zoo} | {len(its)} | {of.get(zoo, sum(of.values()))} | {' | '.join(means)} |")
    least = {k: min(r[k] for r in rows if k in r) for k in RATIOS[:2]}
    text += ["", f"Least: {least['dense_ratio']:.2f} vs dense, {least['sparse_ratio']:.2f} vs sparse.", ""]
    text += ["| model | plain ms | optimized ms | vs dense | sparse plain ms | vs sparse | Gflop | kept MB | at best | as it looks up |"]
    text += ["|---|---|---|---|---|---|---|---|---|---|"]
    for r in sorted(rows, key=lambda r: -r["dense_ratio"]):
        sparse = (f"{r['sparse_ms']:.1f}", f"{r['sparse_ratio']:.2f}") if "sparse_ms" in r else ("", "")
        values = (f"{r['plain_ms']:.1f}", f"{r['ours_ms']:.2f}", f"{r['dense_ratio']:.2f}", *sparse, f"{r['flops'] / 1e9:.3f}")
        values += (f"{r['kept'] / 1e6:.1f}", f"{r['best']:.1f}", f"{r['best_as_is']:.1f}")
        text.append(f"| {r['name'].replace(':', ' ')} | {' | '.join(values)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="ZOO:MODEL")
    parser.add_argument("--repos", type=Path, help="folder of cloned repositories")
    parser.add_argument("--rows", type=Path, help="keep the rows here, and take from here those that are there")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the training steps of one model (default 2)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.models and (wrong := unusable()):
        parser.error("nothing was timed: without the C++ libraries of this code the times are of other code:\n" + "\n".join(wrong))
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    sys.path[:0] = [str(HERE / "zoo_models"), *map(str, repositories(args.repos))]
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows and args.rows.exists() else []
    limits = peak(), memory_rate()
    for model in args.models:
        if model in {r["name"] for r in rows}:
            continue
        try:
            rows.append(measure(*model.split(":"), args.seconds, limits))
        except Exception as error:  # a model that does not run here costs its line
            print(f"{model}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr, flush=True)
            continue
        print("{name}: {dense_ratio:.2f}x, at best {best:.1f}x".format(**rows[-1]), flush=True)
        if args.rows:
            with args.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(f"\npeak {limits[0] / 1e9:.0f} GFLOP/s, memory {limits[1] / 1e9:.1f} GB/s\n")
    print(page(rows))


if __name__ == "__main__":
    main()
