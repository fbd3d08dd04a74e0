"""Peak memory of training steps under what a plan says of the loop (``training``), each in a process of its own.

    python benchmarks/loop_memory.py            # prints a table for benchmarks/results/

A table, and a perceptron of ``--layers`` layers of ``--width``; SGD or Adam. Peak: the largest resident memory during three steps, less what
was resident when the model, its optimizer and its state were made and one small step had been run. Saved: bytes of distinct tensors that
autograd kept for the backward of one batch (the checkpointed modules' own are not kept).
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time

import tablewright as tw
import torch
from torch import nn

CASES = {
    "plain loop": {},
    "in_backward: all": {"in_backward": "all"},
    "checkpoint: [over.*]": {"checkpoint": ["over.*"]},
    "both": {"in_backward": "all", "checkpoint": ["over.*"]},
}


class Model(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.item = nn.EmbeddingBag(10_000, width, mode="sum")
        self.over = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()) for _ in range(layers // 2)))

    def forward(self, ids):
        return self.over(self.item(ids)).square().mean()


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def child(training: dict, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = Model(args.width, args.layers)
    make = {"sgd": lambda p: torch.optim.SGD(p, lr=0.01), "adam": lambda p: torch.optim.Adam(p)}[args.optimizer]
    ids, few = torch.randint(0, 10_000, (args.batch, 10)), torch.randint(0, 10_000, (2, 10))
    plan = {"version": 1, "training": training, "embedding_optimizer": {"adagrad": {"in_backward": True}}, "passes": {"fuse_mlp": args.fused and {"measure": False}}}
    opt, optimizer = tw.optimize(model, plan, optimizer=make([p for n, p in model.named_parameters() if "over" in n]), sample_inputs=few)

    def step(batch) -> None:
        opt(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(few)
    kept: dict[int, int] = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ours = {p.untyped_storage().data_ptr() for p in opt.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = opt(ids)
    del loss
    saved = sum(size for at, size in kept.items() if at not in ours)
    before, most, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        step(ids)
    done.set()
    watcher.join()
    weights = sum(p.numel() * 4 for n, p in opt.named_parameters() if "over" in n)
    print(json.dumps({"peak": most - before, "saved": saved, "weights": weights, "report": opt.report._summary()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--optimizer", choices=("sgd", "adam"), default="adam")
    parser.add_argument("--fused", action="store_true", help="whole perceptrons as one call, whose gradients come together")
    parser.add_argument("--child", type=json.loads)
    args = parser.parse_args()
    if args.child is not None:
        return child(args.child, args)
    print(f"{args.layers} layers of {args.width} x {args.width}, batch {args.batch}, {args.optimizer}{', perceptrons fused' if args.fused else ''}\n")
    print("| training | peak above rest, MB | saved for the backward, MB | (weights, MB) |\n|---|---|---|---|")
    for name, training in CASES.items():
        run = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", json.dumps(training)], capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(run.stderr)
        found = json.loads(run.stdout.splitlines()[-1])
        print(f"| {name} | {found['peak'] / 1e6:.0f} | {found['saved'] / 1e6:.0f} | {found['weights'] / 1e6:.0f} |", flush=True)
    print(f"\n{found['report']}")
    return None


if __name__ == "__main__":
    main()
