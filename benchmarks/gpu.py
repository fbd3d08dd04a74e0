"""Every GPU kernel and two whole training steps on one GPU, beside what its bytes and operations take at the machine's own rates.

    python benchmarks/gpu.py                     # an H200: about 7 minutes; writes benchmarks/results/gpu_<date>.md
    python benchmarks/gpu.py --only bags mlp     # some sections: bags dots mlp fm cross codecs dlrm dcn
    python benchmarks/gpu.py --tiny              # no GPU: tiny sizes in Triton's interpreter, which proves this script and times nothing

The copy rate (bytes read and written by ``torch.Tensor.copy_``) and the rate of a large bfloat16 product are measured first. The
floor of an op is the larger of bytes / copy rate and operations / product rate; for bags each read of a row counts ("no reuse in caches"), so
skewed ids may pass 1. Ratio: floor / time; for multilayer perceptrons: time of the bare products / time. Times are medians (CUDA events,
cache flushed before each; whole steps: wall clock over many steps). ``eager`` and ``torch.compile`` run the plain spelling; TorchRec's
open Triton TBE runs beside the bags where it can be imported. A variant that fails says why in the notes.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SECTIONS = ("bags", "dots", "mlp", "fm", "cross", "codecs", "dlrm", "dcn")
BUDGET = 440  # seconds after which no further section starts

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated, so before any import

import torch  # noqa: E402
from gpu_bench import HEAD, Bench, Op  # noqa: E402


def sections(bench: Bench, chosen: list[str], started: float) -> None:
    """Run the chosen sections in order, while there is time."""
    import gpu_ops
    import gpu_steps

    makers: dict[str, Callable[[Bench], Iterator[Op]]] = {
        "bags": gpu_ops.bags, "dots": gpu_ops.dots, "mlp": gpu_ops.mlps, "fm": gpu_ops.fm, "cross": gpu_ops.crosses,
        "codecs": gpu_ops.codecs,
    }  # fmt: skip
    for name in chosen:
        if time.perf_counter() - started > BUDGET:
            bench.note(f"section {name} was left out: {BUDGET} s are over")
            continue
        try:
            if name in makers:
                for op in makers[name](bench):
                    bench.add(op)
                    if not bench.tiny:
                        torch.compiler.reset()
            else:
                gpu_steps.steps(bench, name, started + BUDGET)
        except Exception as error:
            bench.note(f"section {name} stopped: {type(error).__name__}: {error}")
            if bench.tiny:
                raise
        if not bench.tiny:
            torch.cuda.empty_cache()


def describe(bench: Bench) -> list[str]:
    """The machine, versions and commit, for the head of the page."""
    import triton

    name = "no GPU: Triton's interpreter, times mean nothing" if bench.tiny else torch.cuda.get_device_name()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    return [
        f"# GPU kernels, {datetime.date.today()}", "",
        f"{name}; Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}, commit {commit.strip() or 'unknown'}.",
        f"Copy rate {bench.copy_rate / 1e9:,.0f} GB/s, bfloat16 products {bench.flop_rate / 1e12:,.0f} TFLOP/s, both measured. Medians.", "",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes in Triton's interpreter, without a GPU")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_<date>.md; with --tiny: nowhere")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny proves the script in Triton's interpreter")
    started = time.perf_counter()
    torch.manual_seed(0)
    bench = Bench(options.tiny)
    head = describe(bench)
    print("\n".join(head))
    for line in ("| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)):
        bench.rows.append(line)
        print(line)
    sections(bench, options.only, started)
    bench.notes.append(f"all of it took {time.perf_counter() - started:.0f} s")
    out = options.out or (None if options.tiny else Path(__file__).parent / "results" / f"gpu_{datetime.date.today()}.md")
    if out is not None:
        notes = ["", "Notes", "", *(f"* {note}" for note in bench.notes)]
        out.write_text("\n".join(head + bench.rows + notes) + "\n")


if __name__ == "__main__":
    main()
