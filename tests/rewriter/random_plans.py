"""Random plans for the programs of ``random_models.py``, trained beside a reference that is written here from the formulas.

The reference knows nothing of the package: the plain model gives dense gradients, the ids of the batch say which rows were
looked up, and each row is updated as ``kernels/embedding/updates.py`` says.
"""
from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import partial

import tablewright as tw
import torch
from random_loops import Different, both, close, compare_outputs, total
from random_programs import DTYPES, Program
from torch import Tensor, nn

_KINDS = {"sgd": tw.SGD, "adagrad": tw.Adagrad, "rowwise_adagrad": tw.RowwiseAdagrad, "adam": tw.Adam}
Setting = tuple[str, tuple[tuple[str, object], ...], bool]  # kind, options, in_backward


@dataclass(frozen=True)
class PlannedLoop:
    """``main`` is the plan's optimizer, ``special`` other ones for single tables, ``frozen`` the tables it does not train."""

    main: Setting
    special: dict[str, Setting]
    frozen: tuple[str, ...]
    forwards: int
    sizes: tuple[int, ...]
    lr_change: float | None  # a new learning rate after the first step
    seed: int


def _setting(rng: random.Random, program: Program) -> Setting:
    kind = rng.choice(tuple(_KINDS))
    options: dict[str, object] = {"lr": rng.choice((0.1, 0.02)), "weight_decay": rng.choice((0.0, 0.0, 0.1))}
    if kind != "sgd":
        options["eps"] = rng.choice((1e-3, 1e-8)) if program.dtype == "float64" else 1e-3
    if kind == "adam":
        options["betas"] = rng.choice(((0.9, 0.999), (0.5, 0.9)))
    return kind, tuple(options.items()), rng.randrange(2) == 0


def plan(rng: random.Random, program: Program) -> PlannedLoop:
    """A random plan and loop."""
    names = sorted(program.tables)
    special = {n: _setting(rng, program) for n in names if rng.randrange(5) == 0}
    frozen = tuple(n for n in names if n not in special and rng.randrange(10) == 0)
    forwards = rng.choice((1, 1, 2))
    sizes = tuple(rng.choice((5, 5, 2, 1, 9, 0)) for _ in range(3 * forwards))
    change = rng.choice((None, 0.05))
    return PlannedLoop(_setting(rng, program), special, frozen, forwards, (4, *sizes), change, rng.randrange(1 << 20))


def _optimizer(setting: Setting):
    kind, options, in_backward = setting
    return _KINDS[kind](**dict(options), in_backward=in_backward)


def train_both(program: Program, loop: PlannedLoop) -> nn.Module:
    """Three steps of the optimized model and of the reference. Raises :class:`Different`."""
    plain, model = program.build(loop.seed), program.build(loop.seed)
    for name in loop.frozen:
        plain.get_parameter(name).requires_grad_(False)
    rng = random.Random(loop.seed)
    args, kwargs = program.batch(loop.sizes[0], rng)
    tables = {n: tw.TablePlan(embedding_optimizer=_optimizer(s)) for n, s in loop.special.items()}
    tables.update({n: tw.TablePlan(trainable=False) for n in loop.frozen})
    full = tw.Plan(embedding_optimizer=_optimizer(loop.main), tables=tables)
    opt = tw.optimize(model, full, sample_inputs=args, sample_kwargs=kwargs)
    trained = [n for n in program.tables if n not in loop.frozen]
    reference = {n: _Reference(plain.get_parameter(n), loop.special.get(n, loop.main)) for n in trained}
    dense = [
        torch.optim.SGD([p for n, p in m.named_parameters() if n not in program.tables], lr=0.1) for m in (plain, opt)
    ]  # fmt: skip
    sizes = iter(loop.sizes[1:])
    for step in range(3):
        what = f"step {step}"
        losses = [torch.zeros((), dtype=DTYPES[program.dtype])] * 2
        touched: dict[str, set[int]] = {n: set() for n in reference}
        for _ in range(loop.forwards):
            args, kwargs = program.batch(next(sizes), rng)
            torch.manual_seed(rng.randrange(1 << 30))
            results = both(what, partial(plain, *args, **kwargs), partial(opt, *args, **kwargs))
            compare_outputs(what, *results)
            losses = [loss + total(result) for loss, result in zip(losses, results)]
            _touch(program, program.leaves(args, kwargs), touched)
        both(f"{what}, backward", *(loss.backward for loss in losses))
        _compare_gradients(what, plain, opt, reference)
        for table, update in reference.items():
            update.step(sorted(touched[table]))
        if any(not r.in_backward for r in reference.values()):
            opt.embedding_optimizer.step()
        for optimizer, module in zip(dense, (plain, opt)):
            optimizer.step()
            module.zero_grad()
        for name, param in plain.named_parameters():
            close(f"{what}, weight {name}", param, opt.get_parameter(name))
        _compare_state(what, opt, reference)
        if loop.lr_change is not None and reference:
            for group in opt.embedding_optimizer.param_groups:
                group["lr"] = loop.lr_change
            for update in reference.values():
                update.options["lr"] = loop.lr_change
    return opt


def _touch(program: Program, leaves: dict[str, Tensor], touched: dict[str, set[int]]) -> None:
    for read in program.reads:
        if read.table in touched:
            rows = program.tables[read.table]
            touched[read.table] |= {i % rows for i in leaves[read.ids].flatten().tolist()} - {read.padding}


def _compare_gradients(what: str, plain: nn.Module, opt: nn.Module, reference: dict[str, _Reference]) -> None:
    for name, param in plain.named_parameters():
        mine = opt.get_parameter(name).grad
        if name in reference and reference[name].in_backward:
            continue  # used up
        if (param.grad is None) != (mine is None):
            raise Different(f"{what}: gradient of {name} is {mine} instead of {param.grad}")
        close(f"{what}, gradient of {name}", param.grad, mine)


def _compare_state(what: str, opt: nn.Module, reference: dict[str, _Reference]) -> None:
    for name, update in reference.items():
        mine = opt.embedding_optimizer.state.get(opt.get_parameter(name), {})
        for key, value in update.state.items():
            if update.steps:
                close(f"{what}, {key} of {name}", value, mine[key])
        if update.steps and int(mine["step"]) != update.steps:
            raise Different(f"{what}: {name} has made {mine['step']} steps instead of {update.steps}")


class _Reference:
    """One table's update, row by row, in plain torch."""

    def __init__(self, table: nn.Parameter, setting: Setting) -> None:
        self.kind, options, self.in_backward = setting
        self.options = {"eps": 1e-10 if self.kind == "adagrad" else 1e-8, "betas": (0.9, 0.999), **dict(options)}
        self.table, self.steps = table, 0
        self.state: dict[str, Tensor] = {}
        if self.kind == "adagrad":
            self.state = {"sum": torch.zeros_like(table)}
        elif self.kind == "rowwise_adagrad":
            self.state = {"sum": torch.zeros_like(table[:, 0])}
        elif self.kind == "adam":
            self.state = {"exp_avg": torch.zeros_like(table), "exp_avg_sq": torch.zeros_like(table)}
        self.state = {key: value.detach() for key, value in self.state.items()}

    @torch.no_grad()
    def step(self, touched: list[int]) -> None:
        """Update the rows that were looked up, from the dense gradient."""
        if self.table.grad is None:
            return
        self.steps += 1
        lr, eps, (beta1, beta2) = self.options["lr"], self.options["eps"], self.options["betas"]
        for i in touched:
            row, g = self.table[i], self.table.grad[i]
            row.mul_(1 - lr * self.options["weight_decay"])
            if self.kind == "sgd":
                row.sub_(lr * g)
            elif self.kind == "adam":
                m, v = self.state["exp_avg"][i], self.state["exp_avg_sq"][i]
                m.copy_(beta1 * m + (1 - beta1) * g)
                v.copy_(beta2 * v + (1 - beta2) * g * g)
                size = lr * math.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)
                row.sub_(size * m / (v.sqrt() + eps))
            else:
                total = self.state["sum"][i]
                total.add_(g * g if self.kind == "adagrad" else (g * g).mean())
                row.sub_(lr * g / (total.sqrt() + eps))


