"""Compressed tables (``compress`` in a plan): memory saved, and the AUC beside the same model with whole tables.

    python benchmarks/compression_auc.py --movielens ml-100k --out benchmarks/results/compression_auc.md
    python benchmarks/compression_auc.py --only criteo --seeds 2

"MovieLens" is the model and the split of ``examples/train_movielens.py`` (real ratings, the newest tenth held out), "Criteo" the DLRM of
``examples/dlrm.py`` on rows that ``examples/criteo.py`` generates. Every form starts from the same weights as the whole model and sees the
same batches; product quantization compresses the trained whole model. Differences are of the held-out AUC, form minus whole, one for each seed.
"""
from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import tablewright as tw
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import criteo  # noqa: E402
import movielens  # noqa: E402
from dlrm import DLRM  # noqa: E402
from side_by_side import Example, Learner  # noqa: E402
from train_movielens import FilmModel  # noqa: E402

WHOLE = "whole tables"


def forms(rows: int, few: int, narrow: int, parts: int) -> dict[str, dict]:
    """The forms that are compared, by what they are called."""
    return {
        f"hashing, {rows:,} rows": {"hashing": {"rows": rows}},
        f"quotient-remainder, {rows:,} buckets, multiply": {"quotient_remainder": {"buckets": rows}},
        f"quotient-remainder, {rows:,} buckets, add": {"quotient_remainder": {"buckets": rows, "combine": "add"}},
        f"quotient-remainder, {few:,} buckets, multiply": {"quotient_remainder": {"buckets": few}},
        f"mixed dims, {narrow} of 16": {"mixed_dim": {"dim": narrow}},
        f"product quantization, {parts} parts, after training": {"product_quantization": {"parts": parts}},
    }


class Movies:
    """MovieLens-100k: five epochs in batches of 512."""

    name, lr = "MovieLens", 0.02
    globs = ("user", "film")
    forms = forms(rows=200, few=32, narrow=4, parts=8)

    def __init__(self, folder: Path) -> None:
        self.ratings = movielens.load(folder)
        newest = int(len(self.ratings.liked) * 0.9)
        self.older, newer = np.arange(newest), np.arange(newest, len(self.ratings.liked))
        self.held_out = list(self.ratings.batches(newer, 512))

    def model(self) -> torch.nn.Module:
        return FilmModel(self.ratings.sizes())

    def examples(self, seed: int) -> Iterator[Example]:
        shuffle = np.random.default_rng(seed)
        for _ in range(5):
            yield from self.ratings.batches(shuffle.permutation(self.older), 512)


class Clicks:
    """Rows like Criteo's: one pass of 400 batches of 512."""

    name, lr = "Criteo, generated", 0.003
    globs = ("tables.*",)
    forms = forms(rows=5_000, few=250, narrow=4, parts=8)
    rows_per_table, train, held = 50_000, 400 * 512, 20_000

    def __init__(self, folder: Path) -> None:
        self.file = folder / "criteo_like.tsv"
        criteo.write_synthetic(self.file, self.train + self.held, 0)
        self.held_out = list(self._read(self.train, self.held))

    def _read(self, skip: int, limit: int) -> Iterator[Example]:
        for dense, ids, labels in criteo.read_batches(self.file, [self.rows_per_table] * 26, 512, skip, limit):
            yield (dense, ids), labels

    def model(self) -> torch.nn.Module:
        return DLRM([self.rows_per_table] * 26, dim=16, bottom=(128, 64), top=(256, 256, 128), mode="single")

    def examples(self, seed: int) -> Iterator[Example]:
        return self._read(0, self.train)


def plan(data: Movies | Clicks, form: dict | None) -> tw.Plan:
    return tw.Plan() if form is None else tw.Plan(numerics="approximate", tables={glob: {"compress": form} for glob in data.globs})


def trained(data: Movies | Clicks, model: torch.nn.Module, form: dict | None, seed: int) -> tw.OptimizedModel:
    optimizer = torch.optim.Adagrad(model.parameters(), lr=data.lr)
    opt, optimizer = tw.optimize(model, plan(data, form), optimizer=optimizer, sample_inputs=data.held_out[0][0])
    learner = Learner("", opt, [optimizer])
    for inputs, labels in data.examples(seed):
        learner.step(inputs, labels)
    return opt


def table_bytes(opt: torch.nn.Module, globs: Iterable[str]) -> int:
    """Of the tables that the plan compresses, with all that they consist of."""
    kept = [*opt.named_parameters(), *opt.named_buffers()]
    return sum(t.numel() * t.element_size() for n, t in kept if any(n.startswith(glob.removesuffix("*")) for glob in globs))


def measure(data: Movies | Clicks, seeds: int, say: Callable[[str], None]) -> None:
    found: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    whole: list[float] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        start = data.model()
        model = copy.deepcopy(start)
        opt = trained(data, model, None, seed)
        whole.append(Learner("", opt, []).auc(data.held_out))
        sizes[WHOLE] = table_bytes(opt, data.globs)
        print(f"{data.name}, seed {seed}, {WHOLE}: AUC {whole[-1]:.4f}", file=sys.stderr, flush=True)
        for name, form in data.forms.items():
            began = time.perf_counter()
            if "product_quantization" in form:
                small = tw.optimize(opt.unoptimized(), plan(data, form), sample_inputs=data.held_out[0][0])
            else:
                small = trained(data, copy.deepcopy(start), form, seed)
            found.setdefault(name, []).append(Learner("", small, []).auc(data.held_out) - whole[-1])
            sizes[name] = table_bytes(small, data.globs)
            print(f"{data.name}, seed {seed}, {name}: {found[name][-1]:+.4f} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
    say(f"| {data.name} | {WHOLE} | {sizes[WHOLE]:,} | 1.0 | AUC {', '.join(f'{a:.4f}' for a in whole)} | |")
    for name, differences in found.items():
        each = ", ".join(f"{d:+.4f}" for d in differences)
        say(f"| {data.name} | {name} | {sizes[name]:,} | {sizes[WHOLE] / sizes[name]:.1f} | {each} | {np.mean(differences):+.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--movielens", type=Path, default=Path("ml-100k"), metavar="DIR", help="default: ml-100k")
    parser.add_argument("--only", choices=("movielens", "criteo"), help="default: both")
    parser.add_argument("--seeds", type=int, default=3, help="of weights and shuffles (default: 3)")
    parser.add_argument("--out", type=Path, help="default: print only")
    args = parser.parse_args()
    lines = ["| data | form | bytes of the tables | times smaller | AUC, or its difference, by seed | mean |", "|---|---|---|---|---|---|"]
    print("\n".join(lines))

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    if args.only != "criteo":
        measure(Movies(args.movielens), args.seeds, say)
    if args.only != "movielens":
        with tempfile.TemporaryDirectory() as folder:
            measure(Clicks(Path(folder)), args.seeds, say)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
