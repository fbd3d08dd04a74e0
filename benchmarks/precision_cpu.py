"""bf16 by plan beside torch.autocast, on CPU: dense parts (forward and backward) and whole DLRM training steps, calls in turn.

    python benchmarks/precision_cpu.py --threads 1 2 --out benchmarks/results/precision_cpu.md

"autocast" is the plain model under ``torch.autocast("cpu", torch.bfloat16)``; whole steps are those of ``embedding_cpu.py``: one-hot ids,
26 tables of 100,000 rows, AdaGrad, plain with ``sparse=True`` gradients, ours updated in the backward.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import tablewright as tw
import torch
import torch.nn.functional as F
from dense_cpu import BATCH, Cross, mlp
from embedding_cpu import Setting, heading
from torch import nn
from workload import Bags, Dense, Shape, Whole, interleaved, median_ms

BF16 = tw.Plan(precision="bf16")
DENSE = {
    "MLP 479-1024-1024-512-256-1": (lambda: mlp(479, 1024, 1024, 512, 256, 1), [(479,)]),
    "MLP 479-1024-1024-512-256-1, dropout 0.2": (lambda: mlp(479, 1024, 1024, 512, 256, 1, dropout=0.2), [(479,)]),
    "MLP 400-256-128-64-1": (lambda: mlp(400, 256, 128, 64, 1), [(400,)]),
    "DCN v2, 3 layers of 429": (lambda: Cross(429, 3, "matrix"), [(429,)]),
    "dense part of MLPerf's DLRM, dim 64": (lambda: Dense(26, 64), [(13,), (26, 64)]),
    "dense part of MLPerf's DLRM, dim 128": (lambda: Dense(26, 128), [(13,), (26, 128)]),
}


def dense_calls(name: str) -> dict:
    make, widths = DENSE[name]
    torch.manual_seed(0)
    plain = make()
    inputs = tuple(torch.randn(BATCH, *w, requires_grad=i == len(widths) - 1) for i, w in enumerate(widths))
    sample = tuple(x.detach() for x in inputs)
    seed = torch.randn_like(plain(*inputs))

    def step(model: nn.Module, autocast: bool = False):
        def call(i: int) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(*inputs)
            out.float().backward(seed)

        return call

    ours = {f"ours {plan.precision}": tw.optimize(plain, plan, sample_inputs=sample) for plan in (tw.Plan(), BF16)}
    return {"plain": step(plain), "autocast": step(plain, True), **{n: step(m) for n, m in ours.items()}}


def whole_calls(dim: int) -> dict:
    shape = Shape(26, 100_000, dim, 1)
    setting = Setting(shape, rowwise=False)
    sample = (setting.dense[0], setting.lists[0], setting.offsets)
    calls = {}

    def add(name: str, model: nn.Module, optimizers: list, autocast: bool = False) -> None:
        def call(i: int) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(setting.dense[i % 4], setting.lists[i % len(setting.lists)], setting.offsets)
            F.binary_cross_entropy_with_logits(out.float(), setting.labels).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        calls[name] = call

    plain = Whole(setting.plain(sparse=True), Dense(26, dim))
    own = [setting.plain_optimizer(plain.embedding), torch.optim.Adagrad(plain.dense.parameters(), lr=0.01)]
    add("plain", plain, own)
    add("autocast", plain, own, True)
    for precision in ("fp32", "bf16"):
        rows = tw.Adagrad(lr=0.01, eps=1e-10, in_backward=True)
        plan = tw.Plan(precision=precision, embedding_optimizer=rows)
        mine = Whole(Bags(setting.mine.weights, sparse=False), Dense(26, dim))
        opt, rest = tw.optimize(mine, plan, optimizer=torch.optim.Adagrad(mine.dense.parameters(), lr=0.01), sample_inputs=sample)
        setting.share(opt.embedding_optimizer)
        add(f"ours {precision}", opt, [rest])
    return calls


def row(what: str, threads: int, times: dict[str, list[float]]) -> str:
    ms = {name: median_ms(t) for name, t in times.items()}
    cells = " | ".join(f"{ms[n]:.2f}" for n in ("plain", "autocast", "ours fp32", "ours bf16"))
    return f"| {what} | {threads} | {cells} | {ms['autocast'] / ms['ours bf16']:.2f} | {ms['plain'] / ms['ours bf16']:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="a part of the names of what to measure")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [
        "| what | threads | plain | autocast | ours fp32 | ours bf16 | times as fast as autocast | as plain |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    what = {n: (lambda n=n: dense_calls(n)) for n in DENSE}
    what.update({f"whole DLRM step, dim {dim}, pooling 1": (lambda dim=dim: whole_calls(dim)) for dim in (64, 128)})
    for name in [n for n in what if options.only in n]:
        torch.set_num_threads(max(options.threads))
        calls = what[name]()
        for threads in options.threads:
            torch.set_num_threads(threads)
            lines.append(row(name, threads, interleaved(calls, options.rounds)))
            print(lines[-1], flush=True)
    if options.out:
        text = heading().split("Milliseconds")[0] + f"Batch {BATCH}, medians in milliseconds.\n\n"
        options.out.write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
