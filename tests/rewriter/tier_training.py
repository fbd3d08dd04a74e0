"""A process that trains a model in tiers, takes a snapshot every three steps and is killed at some moment."""
from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import tablewright as tw
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, device=None, rows=1000):
        super().__init__()
        self.item = nn.Embedding(rows, 8, padding_idx=3, device=device)
        self.user = nn.EmbeddingBag(500, 8, mode="sum")
        self.top = nn.Linear(24, 1)

    def forward(self, items, users):
        return self.top(torch.cat([self.item(items).flatten(1), self.user(users)], 1)).squeeze(1)


def batch(step, rows=1000):
    generator = torch.Generator().manual_seed(step)
    items = (torch.rand(32, 2, generator=generator) ** 3 * rows).long()
    return items, torch.randint(0, 500, (32, 3), generator=generator), torch.rand(32, generator=generator)


def model_in(folder, resume=False, cache=40_000, **more):
    torch.manual_seed(0)
    model = Model()
    storage = {"cache": cache, **more}
    if storage.get("backing") != "host":
        storage.update({"path": str(Path(folder) / "item"), **({"resume": str(Path(folder) / "kept")} if resume else {})})
    plan = tw.Plan.from_dict({"version": 1, "tables": {"item": {"storage": storage}}})
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    opt, optimizer = tw.optimize(model, plan, optimizer=optimizer, sample_inputs=batch(0)[:2])
    if resume:
        opt.restore(Path(folder) / "kept", optimizer)
    return opt, optimizer


def after_kills(folder, times, seed, **storage):
    """Models that went on from the last snapshot of a process that was killed, each with its optimizer, its number of steps, and a model (and its
    optimizer) in a folder of its own that took those steps in one go."""
    folders = [str(Path(tw.__file__).parent.parent), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    first, chance = 0, random.Random(seed)
    for _ in range(times):
        command = [sys.executable, __file__, str(folder), str(first), *(f"{k}={v}" for k, v in storage.items())]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert run.stdout.readline(), "it did not reach its first snapshot"
        time.sleep(chance.random() * 0.4)
        run.send_signal(signal.SIGKILL)
        run.stdout.read()
        run.wait()
        opt, optimizer = model_in(folder, resume=True, **storage)
        steps = int(optimizer.state[opt.top.weight]["step"])
        assert steps > first and steps % 3 == 0
        own = Path(folder) / f"straight{steps}"
        own.mkdir()
        straight, other = model_in(own)
        train(straight, other, 0, steps)
        yield opt, optimizer, steps, straight, other
        opt._tiered.open["item.weight"].cache.close()
        first = steps


def train(model, optimizer, first, last):
    for step in range(first, last):
        items, users, wanted = batch(step)
        ((model(items, users) - wanted) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    folder, first = sys.argv[1], int(sys.argv[2])
    opt, optimizer = model_in(folder, resume=first > 0, **dict(each.split("=") for each in sys.argv[3:]))
    for step in range(first, 10**9, 3):
        train(opt, optimizer, step, step + 3)
        opt.snapshot(Path(folder) / "kept", optimizer)
        print(step + 3, flush=True)
