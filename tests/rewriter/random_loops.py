"""Random training loops for the programs of ``random_models.py``, and one that runs a plain and an optimized model in step."""
from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import tablewright as tw
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from random_programs import DTYPES, Program
from torch import Tensor, nn

# Largest difference allowed, relative to the largest value of the tensor.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Loop:
    """How a model is trained. ``sizes``: one batch size for each forward, the first that of the sample inputs."""

    optimizer: str
    options: dict
    groups: str  # one, two (other learning rate), some (only some of the parameters)
    scheduler: str  # "", "before" (built on the user's optimizer) or "after" (on the returned one)
    zero: str  # none, zeros, model
    forwards: int  # forwards of one backward
    backwards: int  # backwards of one step
    sizes: tuple[int, ...]
    samples: str  # one, two batches
    evaluate: bool  # an evaluation between the steps
    reload: bool  # state_dict and load_state_dict of the optimizer between the steps
    seed: int


_OPTIMIZERS = (
    ("SGD", {}), ("SGD", {}), ("SGD", {"maximize": True}), ("SGD", {"momentum": 0.9}), ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"weight_decay": 0.1}), ("SGD", {"foreach": False}),
    ("Adagrad", {}), ("Adagrad", {}), ("Adagrad", {"lr_decay": 0.1}), ("Adagrad", {"initial_accumulator_value": 0.5}),
    ("Adagrad", {"eps": 1e-3, "maximize": True}), ("Adagrad", {"weight_decay": 0.1}), ("Adagrad", {"foreach": True}),
    ("Adam", {}), ("AdamW", {}), ("SparseAdam", {}),
)  # fmt: skip


def loop(rng: random.Random, program: Program) -> Loop:
    """A random loop for ``program``."""
    name, options = rng.choice(_OPTIMIZERS)
    if name == "SparseAdam" and not (program.tables and program.sparse == set(program.tables)):
        name, options = "Adagrad", {}
    if program.dtype in ("float16", "bfloat16"):
        name, options = "SGD", {}  # others divide by what they rounded
    if program.dtype == "float32" and name != "SGD":
        options = {"eps": 1e-3, **options}  # a gradient of rounding noise must not become a whole step
    forwards, backwards = rng.choice((1, 1, 1, 2)), rng.choice((1, 1, 1, 2))
    sizes = tuple(rng.choice((5, 5, 5, 2, 1, 9, 0)) for _ in range(3 * forwards * backwards))
    return Loop(
        name, {"lr": 0.1, **options}, rng.choice(("one", "one", "two", "some")), rng.choice(("", "", "before", "after")),
        rng.choice(("none", "none", "zeros", "model")), forwards, backwards, (rng.choice((4, 4, 4, 3, 1)), *sizes),
        rng.choice(("one", "one", "two")), rng.randrange(4) == 0, rng.randrange(5) == 0, rng.randrange(1 << 20),
    )  # fmt: skip


class Different(AssertionError):
    """The optimized model did something else."""


def close(what: str, plain: Any, optimized: Any) -> None:
    """Raises :class:`Different` unless both are the same tensor up to rounding. Sparse is compared as dense."""
    if plain is None and optimized is None:
        return
    if not isinstance(plain, Tensor) or not isinstance(optimized, Tensor):
        if type(plain) is not type(optimized) or plain != optimized:
            raise Different(f"{what}: {optimized!r} instead of {plain!r}")
        return
    a, b = (t.detach().to_dense() if t.layout != torch.strided else t.detach() for t in (plain, optimized))
    if a.shape != b.shape or a.dtype != b.dtype:
        raise Different(f"{what}: {tuple(b.shape)} {b.dtype} instead of {tuple(a.shape)} {a.dtype}")
    if a.numel() == 0:
        return
    scale = a.double().abs().nan_to_num(0, 0, 0).max().clamp_min(1.0)
    error = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a.double() - b.double()).abs()).max() / scale
    if not error <= TOLERANCE.get(a.dtype, 0.0):
        raise Different(f"{what}: differs by {float(error):.3g} of its largest value\nplain {a}\noptimized {b}")


def optimizer_for(model: nn.Module, loop: Loop) -> torch.optim.Optimizer:
    """What the user builds on a plain model."""
    params = [p for p in model.parameters() if p.requires_grad]
    kind = getattr(torch.optim, loop.optimizer)
    if loop.optimizer == "SparseAdam":
        tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
        params = [p for p in params if id(p) in tables]
    if not params:
        raise BrokenProgram("nothing to train")
    if loop.groups == "one" or len(params) < 2:
        return kind(params, **loop.options)
    half = random.Random(loop.seed).sample(params, len(params) // 2)
    rest = [p for p in params if all(p is not h for h in half)]
    if loop.groups == "some":
        return kind(half, **loop.options)
    return kind([{"params": half, "lr": 0.02}, {"params": rest}], **loop.options)


def samples(program: Program, loop: Loop, rng: random.Random) -> dict[str, Any]:
    """The ``sample_inputs`` and ``sample_kwargs`` of ``optimize``."""
    args, kwargs = program.batch(loop.sizes[0], rng)
    if loop.samples == "two" and not kwargs:
        return {"sample_inputs": [args, program.batch(7, rng)[0]]}
    return {"sample_inputs": args, "sample_kwargs": kwargs}


def total(outputs: Any) -> Tensor:
    """A loss that gives every output a gradient of its own, and large ones a small one, so that no training explodes."""
    leaves = [o for o in pytree.tree_leaves(outputs) if isinstance(o, Tensor)]
    return sum(((F.softsign(o) * (1 + 0.1 * i)).sum() for i, o in enumerate(leaves)), torch.zeros((), dtype=leaves[0].dtype))


def attempt(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The result of ``call``, or what it raised."""
    try:
        return call(), None
    except Exception as error:
        return None, error


class BrokenProgram(Exception):
    """The plain program is not a sound one; there is nothing to compare."""


def both(what: str, plain: Callable[[], Any], optimized: Callable[[], Any], draws: bool = True) -> tuple[Any, Any]:
    """Run both under one random state, which the second may move only as the first does (not at all without ``draws``).

    Raises :class:`Different` if only one of them fails, ``StopIteration`` if both do.
    """
    state = torch.get_rng_state()
    a, wrong = attempt(plain)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    b, error = attempt(optimized)
    if wrong is not None:
        if "modified by an inplace operation" in str(wrong) or isinstance(wrong, NotImplementedError):
            raise BrokenProgram from wrong  # a rewritten graph may well be able to
        if error is None:
            raise Different(f"{what}: the plain model raises {wrong!r}, the optimized one does not")
        raise StopIteration from wrong
    if error is not None:
        raise Different(f"{what}: the optimized model raises {type(error).__name__}: {error}") from error
    if not torch.equal(after if draws else state, torch.get_rng_state()):
        raise Different(f"{what}: other random draws")
    return a, b


def compare_outputs(what: str, plain: Any, optimized: Any) -> None:
    """Structures and values of two results."""
    (first, spec), (second, other) = pytree.tree_flatten(plain), pytree.tree_flatten(optimized)
    if spec != other:
        raise Different(f"{what}: {other} instead of {spec}")
    for i, (a, b) in enumerate(zip(first, second)):
        close(f"{what}, output {i}", a, b)


def compare_models(what: str, plain: nn.Module, optimized: nn.Module) -> None:
    """Weights, buffers and gradients."""
    theirs = dict(optimized.named_parameters())
    if list(theirs) != [n for n, _ in plain.named_parameters()]:
        raise Different(f"{what}: parameters {list(theirs)}")
    for name, param in plain.named_parameters():
        close(f"{what}, weight {name}", param, theirs[name])
        if param.grad is None and theirs[name].grad is not None or param.grad is not None and theirs[name].grad is None:
            raise Different(f"{what}: gradient of {name} is {theirs[name].grad} instead of {param.grad}")
        close(f"{what}, gradient of {name}", param.grad, theirs[name].grad)
    for (name, a), (_, b) in zip(plain.named_buffers(), optimized.named_buffers(), strict=True):
        close(f"{what}, buffer {name}", a, b)


def compare_optimizers(what: str, plain: torch.optim.Optimizer, optimized: torch.optim.Optimizer) -> None:
    """``state_dict``, entry by entry."""
    a, b = plain.state_dict(), optimized.state_dict()
    (first, spec), (second, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    if spec != other:
        raise Different(f"{what}: optimizer state {other} instead of {spec}")
    for i, (x, y) in enumerate(zip(first, second)):
        close(f"{what}, optimizer state {i}", x, y)


def train_both(program: Program, loop: Loop) -> Any:
    """Three steps of the plain loop on a plain model and on its optimized twin. Raises :class:`Different`.

    Returns the optimized model, or ``None`` where the plain model itself fails on the sample inputs.
    """
    plain, model = program.build(loop.seed), program.build(loop.seed)
    rng = random.Random(loop.seed)
    given = samples(program, loop, rng)
    before, optimizer = (optimizer_for(m, loop) for m in (plain, model))
    schedulers = []
    if loop.scheduler == "before":
        schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (before, optimizer)]
    first = given["sample_inputs"]
    twin = copy.deepcopy(plain)
    try:
        result = both(
            "optimize", lambda: twin(*(first[0] if isinstance(first, list) else first), **given.get("sample_kwargs", {})),
            lambda: tw.optimize(model, optimizer=optimizer, **given), draws=False,
        )  # fmt: skip
    except StopIteration:
        return None
    opt, after = result[1]
    if loop.scheduler == "after":
        schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (before, after)]
    sizes = iter(loop.sizes[1:])
    try:
        for step in range(3):
            _step(f"step {step}", program, loop, rng, sizes, (plain, opt), (before, after), schedulers)
            if loop.evaluate:
                _evaluate(f"evaluation {step}", program, rng, plain, opt)
            if loop.reload:
                for o in (before, after):
                    o.load_state_dict(copy.deepcopy(o.state_dict()))
    except StopIteration:
        pass
    return opt


def _step(what: str, program: Program, loop: Loop, rng: random.Random, sizes, models, optimizers, schedulers) -> None:
    if loop.zero == "model":
        for model in models:
            model.zero_grad()
    else:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=loop.zero == "none")
    for _ in range(loop.backwards):
        losses = [torch.zeros((), dtype=DTYPES[program.dtype]) for _ in models]
        for _ in range(loop.forwards):
            args, kwargs = program.batch(next(sizes), rng)
            torch.manual_seed(rng.randrange(1 << 30))
            results = both(f"{what}, forward", *(partial(model, *args, **kwargs) for model in models))
            compare_outputs(what, *results)
            losses = [loss + total(result) for loss, result in zip(losses, results)]
        both(f"{what}, backward", *(loss.backward for loss in losses))
    compare_models(f"{what}, after backward", *models)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.*")  # that a scheduler misses the optimizer's step
        both(f"{what}, optimizer", optimizers[0].step, optimizers[1].step)
        if schedulers:
            both(f"{what}, scheduler", schedulers[0].step, schedulers[1].step)
    compare_models(f"{what}, after the optimizer", *models)
    if DTYPES[program.dtype].itemsize == 2:
        models[1].load_state_dict(models[0].state_dict())  # a rounding must not become another branch of a relu
    compare_optimizers(what, *optimizers)


def _evaluate(what: str, program: Program, rng: random.Random, plain: nn.Module, opt: nn.Module) -> None:
    args, kwargs = program.batch(3, rng)
    for model in (plain, opt):
        model.eval()
    with torch.no_grad():
        compare_outputs(what, *both(what, lambda: plain(*args, **kwargs), lambda: opt(*args, **kwargs)))
    for model in (plain, opt):
        model.train()
