"""Train copies of one model on the same batches and compare what they learn and how fast.

The `train_*.py` examples call `compare` with two learners, the plain model first and the optimized one second;
more may follow, to be shown beside them.

What "the same result" means. Both copies start from the same weights, and the optimized one computes the same
sums, some in another order, so the last bit of a float32 differs here and there. Training amplifies that: as soon
as one ReLU input close to zero falls on the other side, a few weights take another path, and the two runs part
slowly, as two runs of the plain model do when the rows of its batches are reordered. So there are two checks:
a sharp one after the first steps, on every loss and all weights, where any wrong gradient or update would show;
and one at the end, on the loss curves and the held-out AUC, with room for the parting of ways.
"""

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Inputs = tuple[Tensor, ...]
Example = tuple[Inputs, Tensor]  # what the model takes, and the labels: one batch

WARM_UP = 10  # steps: not timed, and followed by the sharp check
BLOCK = 10  # steps that one learner makes before the next one takes its turn
EARLY_LOSS = 1e-4  # sharp check: largest difference of a loss
EARLY_WEIGHTS = 1e-3  # sharp check: norm of the weights' difference / norm of the weights
LATE_LOSS = 1e-2  # largest difference of the loss averaged over a tenth of the training
LATE_AUC = 2e-3


@dataclass
class Learner:
    """A model with its optimizers, and the record of its training."""

    name: str
    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each step
    rows: list[int] = field(default_factory=list)  # of each step

    def step(self, inputs: Inputs, labels: Tensor) -> None:
        """One turn of the plain training loop: the same code for every learner."""
        began = time.perf_counter()
        loss = F.binary_cross_entropy_with_logits(self.model(*inputs), labels)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append(loss.item())
        if labels.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)
        self.rows.append(len(labels))

    def rows_per_second(self, warm_up: int) -> float:
        """Rows trained per second in the median step, the first `warm_up` steps not counted."""
        return float(np.median(np.divide(self.rows[warm_up:], self.seconds[warm_up:])))

    @torch.no_grad()
    def auc(self, examples: Iterable[Example]) -> float:
        self.model.eval()
        pairs = [(labels, self.model(*inputs)) for inputs, labels in examples]
        self.model.train()
        labels, scores = (torch.cat(parts).cpu().double().numpy() for parts in zip(*pairs, strict=True))
        return auc(labels, scores)


def compare(
    learners: Sequence[Learner],
    examples: Iterable[Example],
    held_out: Sequence[Example],
    steps: int,
    out: Path,
    same_algorithm: bool = True,
) -> int:
    """Trains the learners for `steps` batches of `examples`, prints and draws the comparison.

    Returns the exit code: 1 if the second learner differs from the first by more than the tolerance. With
    `same_algorithm=False` (a plan that asks for another optimizer) differences are shown, but none is an error.
    """
    plain = learners[0]
    warm_up = min(WARM_UP, math.ceil(steps / 2))
    examples = iter(examples)
    with Progress(steps) as bar:
        train(learners, itertools.islice(examples, warm_up), bar)
        checks = [early_checks(plain, learner) for learner in learners[1:]]
        train(learners, itertools.islice(examples, steps - warm_up), bar)

    aucs = [learner.auc(held_out) for learner in learners]
    for learner, its_checks, value in zip(learners[1:], checks, aucs[1:], strict=True):
        its_checks += late_checks(plain, learner, aucs[0], value)

    print(loss_table(learners))
    held_out_rows = sum(len(labels) for _, labels in held_out)
    print(f"\nAUC on {held_out_rows:,} held-out rows")
    for learner, value in zip(learners, aucs, strict=True):
        print(f"  {learner.name:<12}{value:.5f}")
    print(f"\nRows per second, median of {steps - warm_up} steps after {warm_up} of warm-up, {torch.get_num_threads()} threads")
    for learner in learners:
        speed = learner.rows_per_second(warm_up)
        print(f"  {learner.name:<12}{speed:>10,.0f}   {speed / plain.rows_per_second(warm_up):.1f}x")
    print(busy_note(), end="")
    for learner, its_checks in zip(learners[1:], checks, strict=True):
        print(f"\nIs {learner.name} the same as plain?")
        for check in its_checks:
            print(f"  {check}")
        largest, relative = weight_difference(plain.model, learner.model)
        print(f"  (all weights at the end: norm of the difference / norm {relative:.1e}, largest difference {largest:.1e})")
    draw(learners, out / "curves.png")

    if not same_algorithm:
        print("The plan asks for another algorithm than the plain model's, so differences are meant to be there.")
        return 0
    if all(check.ok for check in checks[0]):
        return 0
    if all(check.ok for check in checks[0] if check.sharp):
        print("The first steps agree and the curves part later: a large learning rate does that to rounding errors too.")
        print("(train_dlrm.py --also reordered shows how far the plain model gets from itself.)")
    return 1


# ------------------------------------------------------------------------------------------- training


def train(learners: Sequence[Learner], examples: Iterable[Example], bar: "Progress") -> None:
    """Trains every learner on every batch.

    They take turns, BLOCK steps each: whatever else the machine does meets them alike, and each has the caches
    to itself for most of its turn. Reading the data is on nobody's clock.
    """
    examples = iter(examples)
    while block := list(itertools.islice(examples, BLOCK)):
        for learner in learners:
            for inputs, labels in block:
                learner.step(inputs, labels)
        bar.advance(len(block), ", ".join(f"{x.name} {np.mean(x.losses[-BLOCK:]):.4f}" for x in learners))


def repeat(read: Callable[[], Iterable[Example]]) -> Iterator[Example]:
    """The batches of `read()`, again and again: each time is an epoch."""
    while True:
        yield from read()


class Progress:
    """A tqdm bar, or a line for each tenth of the way where tqdm is not installed."""

    def __init__(self, steps: int):
        self.steps, self.done, self.bar = steps, 0, None
        try:
            from tqdm import tqdm

            self.bar = tqdm(total=steps, unit="step", file=sys.stdout, dynamic_ncols=True)
        except ImportError:
            print("tqdm is not installed: printing lines instead of a progress bar")

    def advance(self, steps: int, note: str) -> None:
        before, self.done = self.done, self.done + steps
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss: {note}", refresh=False)
            self.bar.update(steps)
        elif 10 * before // self.steps < 10 * self.done // self.steps:
            print(f"step {self.done}/{self.steps}  loss: {note}", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()


# ------------------------------------------------------------------------------------------ comparing


@dataclass(frozen=True)
class Check:
    what: str
    difference: float
    tolerance: float
    sharp: bool = False  # made after the first steps, before rounding errors have grown

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance  # not a number: not ok

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "TOO LARGE"
        return f"{self.what:<44} differs by {self.difference:.1e}  (tolerance {self.tolerance:.0e})  {verdict}"


def early_checks(a: Learner, b: Learner) -> list[Check]:
    steps = len(a.losses)
    _, relative = weight_difference(a.model, b.model)
    return [
        Check(f"each loss of the first {steps} steps", float(np.abs(np.subtract(a.losses, b.losses)).max()), EARLY_LOSS, True),
        Check(f"all weights after {steps} steps (norm / norm)", relative, EARLY_WEIGHTS, True),
    ]


def late_checks(a: Learner, b: Learner, auc_a: float, auc_b: float) -> list[Check]:
    undefined = math.isnan(auc_a) and math.isnan(auc_b)  # held-out rows of one kind only
    return [
        Check("loss averaged over each tenth of the steps", float(np.abs(np.subtract(means(a), means(b))).max()), LATE_LOSS),
        Check("held-out AUC", 0.0 if undefined else abs(auc_a - auc_b), LATE_AUC),
    ]


def stretches(steps: int) -> list[range]:
    """The training in ten parts."""
    bounds = [steps * k // 10 for k in range(11)]
    return [range(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True) if a < b]


def means(learner: Learner) -> list[float]:
    """The loss averaged over each tenth of the training."""
    return [float(np.mean(learner.losses[part.start : part.stop])) for part in stretches(len(learner.losses))]


@torch.no_grad()
def weight_difference(a: nn.Module, b: nn.Module) -> tuple[float, float]:
    """(largest difference, norm of the difference / norm of a's weights), over all weights, matched by name."""
    ours, theirs = a.state_dict(), b.state_dict()
    if ours.keys() != theirs.keys():
        raise ValueError(f"the models do not have the same weights: {sorted(ours.keys() ^ theirs.keys())}")
    largest, difference_norms, norms = 0.0, [], []
    for name, weight in ours.items():
        difference = weight - theirs[name]
        largest = max(largest, difference.abs().max().item())
        difference_norms.append(difference.norm().item())
        norms.append(weight.norm().item())
    return largest, math.hypot(*difference_norms) / math.hypot(*norms)


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting half."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1; equal scores share the mean of their ranks
    positives = labels.sum()
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return math.nan
    return float((rank[labels > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def busy_note() -> str:
    """A warning where other work on the machine makes the timings worth little."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = load > cores + 0.5
    return f"  These timings are rough: the machine is busy (load {load:.1f} on {cores} cores)\n" if busy else ""


def loss_table(learners: Sequence[Learner]) -> str:
    """Mean losses over each tenth of the training, one column for each learner."""
    text = f"\n{'loss, steps':<14}" + "".join(f"{learner.name:>12}" for learner in learners)
    for part, row in zip(stretches(len(learners[0].losses)), zip(*map(means, learners), strict=True), strict=True):
        text += f"\n{f'{part.start + 1}-{part.stop}':<14}" + "".join(f"{mean:>12.5f}" for mean in row)
    return text


def draw(learners: Sequence[Learner], path: Path) -> None:
    """Saves the loss curves: by step, where they should coincide, and by time, where they should not."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("No picture: matplotlib is not installed.")
        return
    figure, (by_step, by_time) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    styles = [("tab:orange", "-", 4.0), ("tab:blue", "--", 1.6), ("tab:green", ":", 1.6), ("tab:purple", "-.", 1.6)]
    for learner, (color, line, width) in zip(learners, itertools.cycle(styles)):
        width_of_mean = max(1, len(learner.losses) // 25)
        kernel = np.ones(width_of_mean) / width_of_mean
        smooth = np.convolve(learner.losses, kernel, mode="valid")
        first = len(learner.losses) - len(smooth)
        style = dict(color=color, linestyle=line, linewidth=width, label=learner.name)
        by_step.plot(np.arange(first, len(learner.losses)) + 1, smooth, **style)
        by_time.plot(np.cumsum(learner.seconds)[first:], smooth, **style)
    by_step.set(xlabel="step", ylabel=f"training loss (mean of {width_of_mean} steps)", title="Loss by step")
    by_time.set(xlabel="seconds of training", title="Loss by time")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"\nLoss curves: {path}")
