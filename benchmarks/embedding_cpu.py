"""Embedding lookups, their update and a whole DLRM step on the CPU, beside PyTorch, torch.compile and FBGEMM, in one process.

    python benchmarks/embedding_cpu.py --threads 1 2 --out benchmarks/results/embedding_cpu.md

All variants take their calls in turn and see 48 distinct batches. Ours has its own weights and state, on the huge pages that
``optimize`` asks for; where both do not fit (4 x 10M rows) the peers run on the same memory, and so on huge pages too. FBGEMM's CPU wheel holds no OpenMP: it runs one thread whatever is asked. "limit" is this
machine's own time for the same random rows, measured in the same turn (forward: read; step: read, gradient, read-modify-write); "limit with
.grad" writes each summed gradient row to memory besides and reads it again, as the default step must; "torch alone" is what PyTorch takes for as
many sparse gradients where no row is read, summed or written.
FBGEMM is left out where it is not installed (``pip install --no-deps fbgemm-gpu-cpu==1.8.0``).
"""
from __future__ import annotations

import argparse
import gc
import platform
import subprocess
from datetime import date
from pathlib import Path

import tablewright as tw
import torch
import torch.nn.functional as F
from peers import fbgemm_bags
from probe import gather_limit, torch_alone, update_limit
from tablewright.kernels import memory
from torch import Tensor
from workload import Bags, Dense, Shape, Whole, draw_ids, interleaved, median_ms

SHAPES = [(26, 100_000), (4, 10_000_000)]
MOST_BYTES = 14_000_000_000  # of weights and state, for all variants together


class Memory:
    """Weights of all tables, and AdaGrad sums, one after another."""

    def __init__(self, shape: Shape, rowwise: bool) -> None:
        rows, dim = shape.rows, shape.dim
        self.flat = torch.empty(shape.tables * rows * dim).fill_(0.01)
        self.weights = [w.view(rows, dim) for w in self.flat.split(rows * dim)]
        # filled, so that no page of it is the kernel's zero page
        self.state = torch.empty(shape.tables * rows * (1 if rowwise else dim)).fill_(0.1)

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """torch's element-wise AdaGrad, whose sums are this state."""
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
        for param, part in zip(model.parameters(), self.state.split(self.weights[0].numel())):
            optimizer.state[param]["sum"] = part.view_as(param)
        return optimizer


class Setting:
    """Weights, state and batches of one shape, with the variants that use them. Ours has memory of its own, as a user's would
    be, unless both do not fit: then the peers run on ours, and so on its huge pages."""

    def __init__(self, shape: Shape, rowwise: bool) -> None:
        self.shape, self.rowwise = shape, rowwise
        self.mine = Memory(shape, rowwise)
        fits = 2 * 4 * (self.mine.flat.numel() + self.mine.state.numel()) < MOST_BYTES
        self.theirs = Memory(shape, rowwise) if fits else self.mine
        self.ids = draw_ids(shape)
        bags = shape.batch
        self.offsets = torch.arange(0, bags * shape.pooling, shape.pooling)
        self.grads = [torch.randn(bags, shape.tables, shape.dim) * 1e-3 for _ in range(4)]
        self.dense = [torch.rand(bags, 13) for _ in range(4)]
        self.labels = (torch.rand(bags, 1) < 0.25).float()
        self.lists = [list(ids) for ids in self.ids]

    def plain(self, sparse: bool) -> Bags:
        return Bags(self.theirs.weights, sparse)

    def plain_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        return self.theirs.optimizer(model)

    def ours(self, default_step: bool):
        """The product path: the plain module through ``optimize``."""
        model = Bags(self.mine.weights, sparse=False)
        sample = (self.lists[0], self.offsets)
        if default_step:
            return tw.optimize(model, "auto", optimizer=self.mine.optimizer(model), sample_inputs=sample)
        kind = tw.RowwiseAdagrad if self.rowwise else tw.Adagrad
        plan = tw.Plan(embedding_optimizer=kind(lr=0.01, eps=1e-10, in_backward=True))
        model = tw.optimize(model, plan, sample_inputs=sample)
        self.share(model.embedding_optimizer)
        return model

    def share(self, optimizer) -> None:
        """Let a plan's optimizer keep its sums in our memory."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for param, part in zip(params, self.mine.state.split(self.mine.state.numel() // len(params))):
            shape = (param.shape[0],) if self.rowwise else param.shape
            optimizer.state[param].update(step=0, sum=part.view(shape))
        memory.use_huge_pages([self.mine.state])

    def step(self, model, optimizer=None):
        def call(i: int) -> None:
            model(self.lists[i % len(self.lists)], self.offsets).backward(self.grads[i % 4])
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return call

    def forward(self, model):
        def call(i: int) -> None:
            with torch.no_grad():
                model(self.lists[i % len(self.lists)], self.offsets)

        return call


def embedding_calls(setting: Setting) -> tuple[dict, dict]:
    """Forward and step calls of all variants for one setting."""
    forward, step = {}, {}
    plain = setting.plain(sparse=True)
    fused = setting.ours(default_step=False)
    forward["plain"] = setting.forward(plain)
    forward["ours"] = setting.forward(fused)
    step["ours in backward"] = setting.step(fused)
    if not setting.rowwise:
        step["plain sparse"] = setting.step(plain, setting.plain_optimizer(plain))
        step["ours default"] = setting.step(*setting.ours(default_step=True))
        if setting.shape.rows * setting.shape.tables <= 3_000_000:
            dense = setting.plain(sparse=False)
            step["plain dense"] = setting.step(dense, setting.plain_optimizer(dense))
    theirs = fbgemm_bags(setting.shape, setting.theirs.flat, setting.theirs.state, setting.rowwise)
    if theirs is not None:
        ids = [batch.reshape(-1) for batch in setting.ids]
        offsets = torch.arange(0, ids[0].numel() + 1, setting.shape.pooling)
        flat_grads = [g.flatten(1) for g in setting.grads]

        def fbgemm_forward(i: int) -> None:
            with torch.no_grad():
                theirs(ids[i % len(ids)], offsets)

        forward["FBGEMM"] = fbgemm_forward
        step["FBGEMM"] = lambda i: theirs(ids[i % len(ids)], offsets).backward(flat_grads[i % 4])
    memory.wait()
    forward["limit"] = gather_limit(setting.mine.weights, setting.ids, copies=setting.shape.pooling == 1)
    shape, state = setting.shape, setting.mine.state
    bags, copies = shape.batch * shape.tables, shape.pooling == 1
    step["limit"] = update_limit(setting.mine.weights, setting.ids, state, bags, copies)
    if "ours default" in step:
        step["limit with .grad"] = update_limit(setting.mine.weights, setting.ids, state, bags, copies, stored=True)
        step["torch alone"] = torch_alone(setting.theirs.weights, setting.lists, setting.offsets, setting.grads)
        memory.wait()
    return forward, step


def whole_calls(setting: Setting, compile_too: bool) -> dict:
    """Whole DLRM training steps, rowwise or element-wise AdaGrad on the tables, AdaGrad on the dense part."""
    shape = setting.shape
    calls = {}

    def add(name: str, model, optimizers, inputs) -> None:
        def call(i: int) -> None:
            out = model(setting.dense[i % 4], *inputs(i))
            F.binary_cross_entropy_with_logits(out, setting.labels).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        calls[name] = call

    def lists(i: int):
        return setting.lists[i % len(setting.lists)], setting.offsets

    def dense_optimizer(parameters):
        return torch.optim.Adagrad(parameters, lr=0.01)

    sample = (setting.dense[0], *lists(0))
    if not setting.rowwise:
        for name in ["plain sparse"] + (["torch.compile"] if compile_too else []):
            model = Whole(setting.plain(sparse=True), Dense(shape.tables, shape.dim))
            own = [setting.plain_optimizer(model.embedding), dense_optimizer(model.dense.parameters())]
            add(name, torch.compile(model) if name == "torch.compile" else model, own, lists)
        model = Whole(Bags(setting.mine.weights, sparse=False), Dense(shape.tables, shape.dim))
        optimizer = setting.mine.optimizer(model.embedding)
        optimizer.add_param_group({"params": list(model.dense.parameters())})
        opt, optimizer = tw.optimize(model, "auto", optimizer=optimizer, sample_inputs=sample)
        add("ours default", opt, [optimizer], lists)
    kind = tw.RowwiseAdagrad if setting.rowwise else tw.Adagrad
    plan = tw.Plan(embedding_optimizer=kind(lr=0.01, eps=1e-10, in_backward=True))
    opt = tw.optimize(Whole(Bags(setting.mine.weights, sparse=False), Dense(shape.tables, shape.dim)), plan, sample_inputs=sample)
    setting.share(opt.embedding_optimizer)
    add("ours in backward", opt, [dense_optimizer(opt.dense_parameters())], lists)
    theirs = fbgemm_bags(shape, setting.theirs.flat, setting.theirs.state, setting.rowwise)
    if theirs is not None:
        ids = [batch.reshape(-1) for batch in setting.ids]
        offsets = torch.arange(0, ids[0].numel() + 1, shape.pooling)

        class Unflattened(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bags = theirs

            def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
                return self.bags(ids, offsets).view(-1, shape.tables, shape.dim)

        model = Whole(Unflattened(), Dense(shape.tables, shape.dim))
        own = [dense_optimizer(model.dense.parameters())]
        add("FBGEMM", model, own, lambda i: (ids[i % len(ids)], offsets))
    memory.wait()
    return calls


def row(what: str, shape: Shape, threads: int, times: dict[str, list[float]], ours: str) -> str:
    """One line of the table: milliseconds of every variant, then ours against each."""
    ms = {name: median_ms(t) for name, t in times.items()}
    cells = ", ".join(f"{name} {value:.2f}" for name, value in ms.items())
    against = ", ".join(f"{ms[n] / ms[ours]:.2f}x {n}" for n in ms if n != ours and not n.startswith(("ours", "limit", "torch alone")))
    limit = f"{ms['limit'] / ms[ours]:.2f}" if "limit" in ms else ""
    if ours == "ours default" and limit and "limit with .grad" in ms:
        whole = ms["limit with .grad"] + ms["torch alone"]
        limit += f"; {ms['limit with .grad'] / ms[ours]:.2f} of that with .grad; {whole / ms[ours]:.2f} of that and torch alone"
    return f"| {what} | {shape} | {threads} | {cells} | {ours}: {against} | {limit} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=48)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--pooling", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--skews", type=float, nargs="+", default=[0.0, 1.05])
    parser.add_argument("--shapes", type=int, nargs="+", default=[0, 1], help="0: 26 x 100k tables; 1: 4 x 10M tables")
    parser.add_argument("--parts", nargs="+", default=["embedding", "whole"])
    parser.add_argument("--whole-rounds", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="whole steps: torch.compile too (about a minute each)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [heading(), "", "| what | shape | threads | median ms | ratios | fraction of the limit |", "|---|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")

    for tables, rows in (SHAPES[i] for i in args.shapes):
        for dim in args.dims:
            for pooling in args.pooling:
                for skew in args.skews:
                    shape = Shape(tables, rows, dim, pooling, skew=skew)
                    # element-wise sums double the memory, and torch's Adagrad makes its own first: too much for 4 x 10M rows
                    for rowwise in [False, True] if tables * rows * dim <= 1_000_000_000 else [True]:
                        measure(Setting(shape, rowwise), args, say)
                        gc.collect()


def measure(setting: Setting, args, say) -> None:
    name = "rowwise AdaGrad" if setting.rowwise else "AdaGrad"
    for threads in args.threads:
        torch.set_num_threads(threads)
        if "embedding" in args.parts:
            forward, step = embedding_calls(setting)
            slow = {k: step.pop(k) for k in ["plain dense"] if k in step}
            say(row("forward", setting.shape, threads, interleaved(forward, args.rounds), "ours"))
            times = interleaved(step, args.rounds)
            if slow:
                times |= interleaved(slow, 3, warmup=1)
            say(row(f"step, {name}", setting.shape, threads, times, "ours in backward"))
            if "ours default" in times:
                say(row(f"step, {name}", setting.shape, threads, times, "ours default"))
        if "whole" in args.parts and setting.shape.tables == 26:
            times = interleaved(whole_calls(setting, args.compile), args.whole_rounds)
            say(row(f"DLRM step, {name}", setting.shape, threads, times, "ours in backward"))
            if "ours default" in times:
                say(row(f"DLRM step, {name}", setting.shape, threads, times, "ours default"))


def heading() -> str:
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
    cpu = next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "")
    return f"{date.today()}, commit {commit}, {cpu or platform.machine()}, torch {torch.__version__}. Milliseconds are medians."


if __name__ == "__main__":
    main()
