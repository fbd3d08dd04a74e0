"""What ``optimize`` makes of one model, and whether the result is still that model: the measurement of ``tablewright coverage``.

Everything runs on copies. Dropout is set to 0 on both sides (attributes and modules; a model that can only be trained with its dropout,
whose result forward() changes in place, keeps it: both sides draw the same), random states are equal. The optimizer is
AdaGrad, whose first steps have the size of the learning rate whatever the gradient's size: a gradient that is nothing but rounding
(of a bias before a batch norm, say) can move a weight either way. So its eps is larger than usual, and a difference out of bounds
is excused where the plain model itself comes as far from itself when its weights are changed in the last bit.
"""
from __future__ import annotations

import copy
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .equivalence import difference
from .errors import TablewrightError
from .optimize import optimize
from .optimized_model import OptimizedModel
from .report import Report

LR, EPS = 0.05, 1e-5
OUTPUTS, GRADIENTS, STEPS = 1e-5, 1e-4, 1e-4  # largest differences allowed
_ROUNDS = 7


@dataclass
class Case:
    """What a factory may return: a model and batches for it.

    ``batches``: each a tuple of positional arguments (or one tensor or mapping, if that is the only argument); two of different
    size let the check see that no batch size was baked in. ``kwargs``: keyword arguments of every call. Only the first batch is
    given to ``optimize``, both with ``all_batches``."""

    model: nn.Module
    batches: Sequence[Any]
    kwargs: dict[str, Any] = field(default_factory=dict)
    all_batches: bool = False

    def calls(self) -> list[tuple]:
        """The positional arguments of each batch."""
        return [b if isinstance(b, tuple) else (b,) for b in self.batches]


@dataclass
class Coverage:
    """The row of one model. ``state``: "one graph", "pieces", "plain" (left as it was), "not captured", "failed", or
    "does not run" (the plain model itself stops).

    ``kinds``: (applied, found) of each kind of rewrite. ``skipped``: what was found and left, as (kind, status, reason, location,
    count). ``outputs``, ``gradients``, ``steps``: the largest differences from the plain model over train and eval mode and all
    batches, relative to the largest value (steps: absolute, after three AdaGrad steps). ``wrong``: what is out of bounds, in
    words. ``speed``: milliseconds and ratios of a training step, empty where not measured."""

    name: str
    state: str = "failed"
    door: str = ""
    pieces: int = 0
    seconds: float = 0.0
    launches: int = 0
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)
    skipped: list[tuple[str, str, str, str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    outputs: float = float("nan")
    gradients: float = float("nan")
    steps: float = float("nan")
    rounding: bool = False
    wrong: list[str] = field(default_factory=list)
    why: str = ""
    speed: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Ran, rewritten or plain, with the plain model's numbers."""
        return not self.wrong and self.state in ("one graph", "pieces", "plain")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "ok": self.ok}


def measure(
    name: str, case: Case, *, plan: Any = "auto", check: bool = True, speed: bool = False, seconds: float = 4.0,
    cpu_clock: bool = False,
) -> Coverage:  # fmt: skip
    """Optimize a copy of ``case.model`` and, with ``check``, compare it with the plain one. ``speed``: time training steps for
    about ``seconds``: plain with dense gradients, plain with ``sparse=True``, and optimized. ``cpu_clock``: by the time that the
    processor works, of all threads, which other programs disturb little: with one thread it is the time of the step."""
    result = Coverage(name)
    try:
        case, kept = _comparable(case)
    except Exception as error:  # a model that does not run at all is no finding about us
        result.state, result.why = "does not run", _raised(error)
        return result
    try:
        opt, optim = _optimize(result, case, plan)
        result.notes += kept
        if check:
            _compare(result, opt, optim, case)
    except TablewrightError as error:
        result.state, result.why = "not captured", f"{type(error).__name__}: {error}"
        return result
    except Exception as error:  # whatever goes wrong in somebody's model is the finding
        result.state, result.why = "failed", _raised(error)
        return result
    if speed:
        try:
            result.speed = _speeds(opt, optim, case, plan, seconds, time.process_time if cpu_clock else time.perf_counter)
        except Exception as error:
            result.wrong.append(f"timing stopped: {_raised(error)}")
    return result


def without_dropout(model: nn.Module) -> nn.Module:
    """``model`` with every dropout probability, kept in a module or in a number called so, set to 0 in place."""
    for module in model.modules():
        for key, value in vars(module).items():
            named = "drop" in key.lower() or (key == "p" and "Dropout" in type(module).__name__)
            if named and isinstance(value, float):
                setattr(module, key, 0.0)
            elif named and isinstance(value, (list, tuple)) and value and all(isinstance(v, float) for v in value):
                setattr(module, key, type(value)([0.0] * len(value)))
    return model


def _comparable(case: Case) -> tuple[Case, list[str]]:
    """A copy of ``case`` without dropout, or, with a note, with the dropout that its training needs."""
    bare = Case(without_dropout(copy.deepcopy(case.model)), case.batches, case.kwargs, case.all_batches)
    if _trains(bare) or not _trains(case):
        return bare, []
    return Case(copy.deepcopy(case.model), case.batches, case.kwargs, case.all_batches), ["compared with its dropout: without it the plain model cannot be trained"]


def _trains(case: Case) -> bool:
    got = _call(copy.deepcopy(case.model).train(), case.calls()[0], case.kwargs)
    try:
        if any(o.requires_grad for o in got):
            loss_of(got).backward()
    except RuntimeError:
        return False
    return True


def state_of(doors: Sequence[str], pieces: int) -> tuple[str, int]:
    """("one graph" | "pieces" | "plain", number of graphs), from the doors of all captures of a model: the worst one counts."""
    if "none" in doors or not pieces:
        return "plain", 0
    return ("pieces" if any("pieces" in d for d in doors) or pieces > 1 else "one graph"), pieces


# --- numbers -----------------------------------------------------------------------------------------------------------------


def _optimize(result: Coverage, case: Case, plan: Any) -> tuple:
    started = time.perf_counter()
    opt, optim = _optimized(copy.deepcopy(case.model).train(), case, plan)
    result.seconds = time.perf_counter() - started
    report = opt.report
    result.state, result.pieces = state_of([report.door], report.pieces)
    result.door, result.launches, result.notes, result.kinds = report.door, report.launches, list(report.notes), report.coverage
    result.skipped = _reasons(report)
    return opt, optim


def _compare(result: Coverage, opt: OptimizedModel, optim, case: Case) -> None:
    found = _differences(copy.deepcopy(case.model), opt, optim, case)
    result.state, result.pieces = state_of([v.captured.door for v in opt._variants], opt.report.pieces)  # eval mode may need its own
    if result.state == "one graph" and any("outside of every captured graph" in reason for _, _, reason, _, _ in result.skipped):
        result.state = "pieces"  # a graph, but not of all the model
    result.outputs, result.gradients, result.steps = (max((e for e, _ in found[k]), default=0.0) for k in range(3))
    limits = (OUTPUTS, GRADIENTS, STEPS)
    if all(e <= limits[k] for k in range(3) for e, _ in found[k]):
        return
    noise = [_sensitivity(case, seed) for seed in range(4)]  # one change of four may be what tips a maximum or a ReLU
    for k in range(3):
        allowed = [max(limits[k], *(4 * n for n, _ in each)) for each in zip(*(n[k] for n in noise))]
        if len(allowed) != len(found[k]):
            allowed = [limits[k]] * len(found[k])
        result.wrong += [said for (e, said), most in zip(found[k], allowed) if not e <= most]
    result.rounding = not result.wrong
    if result.rounding:
        result.notes.append("larger differences than usual, all of them rounding (the plain model moves as far when weights change in the last bit)")


def _sensitivity(case: Case, seed: int = 0) -> list[list[tuple[float, str]]]:
    """How far the plain model comes from itself, comparison by comparison, when its weights change in the last bit."""
    plain, other = copy.deepcopy(case.model), copy.deepcopy(case.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for w in other.parameters():
            if w.is_floating_point():
                w.mul_(1 + torch.finfo(w.dtype).eps * torch.randn(w.shape, generator=generator).to(w))
    return _differences(plain, other, torch.optim.Adagrad(other.parameters(), lr=LR, eps=EPS), case)


def _optimized(model: nn.Module, case: Case, plan: Any) -> tuple:
    optim = torch.optim.Adagrad(model.parameters(), lr=LR, eps=EPS)
    samples = list(case.calls()) if case.all_batches else case.calls()[0]
    return optimize(model, plan, optimizer=optim, sample_inputs=samples, sample_kwargs=case.kwargs or None)


def _call(model: nn.Module, args: tuple, kwargs: dict) -> list:
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.clone(), (args, kwargs))
    torch.manual_seed(0)
    return [o for o in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(o, Tensor)]


def loss_of(outputs: Sequence[Tensor]) -> Tensor:
    """A fixed random combination of all outputs that have a gradient, the mean over each."""
    torch.manual_seed(1)
    terms = [(o * torch.randn(o.shape, dtype=o.dtype)).mean() for o in outputs if o.requires_grad]
    if not terms:
        raise ValueError("no output of the model has a gradient")
    return torch.stack([t.double() for t in terms]).sum()


def _differences(plain: nn.Module, opt: nn.Module, optim, case: Case) -> list[list[tuple[float, str]]]:
    """(error, what) of outputs, gradients, and weights and buffers after three steps; both models are trained by it."""
    outputs: list[tuple[float, str]] = []
    gradients: list[tuple[float, str]] = []
    for train in (True, False):
        for args in case.calls():
            where = f"in {'train' if train else 'eval'} mode, batch {_rows(args)}"
            sides, trains = [], True
            for model in (plain, opt):
                model.train(train)
                model.zero_grad(set_to_none=True)
                got = _call(model, args, case.kwargs)
                if trains and any(o.requires_grad for o in got):
                    try:
                        loss_of(got).backward()
                    except RuntimeError:
                        if train or model is opt:
                            raise
                        trains = False  # the plain model has no gradients in eval mode: forward() changes in place what they need
                        model.zero_grad(set_to_none=True)
                sides.append((got, {n: p.grad for n, p in model.named_parameters()}))
            (a, ga), (b, gb) = sides
            if len(a) != len(b):
                outputs.append((float("inf"), f"{len(b)} outputs where the plain model has {len(a)}, {where}"))
            outputs += [_said(f"output {i}", x, y, where) for i, (x, y) in enumerate(zip(a, b))]
            scale = max((float(_dense(g).abs().max()) for g in ga.values() if g is not None and g.numel()), default=0.0)
            gradients += [_said(f"gradient of {n}", g, gb.get(n), where, 1e-3 * scale) for n, g in ga.items()]
    for model in (plain, opt):
        model.train(True)
    adagrad = torch.optim.Adagrad(plain.parameters(), lr=LR, eps=EPS)
    for i in range(3):
        args = case.calls()[i % len(case.batches)]
        for model, optimizer in ((plain, adagrad), (opt, optim)):
            optimizer.zero_grad(set_to_none=True)
            got = _call(model, args, case.kwargs)
            if any(o.requires_grad for o in got):
                loss_of(got).backward()
            optimizer.step()
    after = dict(opt.state_dict())
    steps = []
    for n, w in plain.state_dict().items():
        if isinstance(w, Tensor) and n in after:
            error = _distance(w, after[n])
            steps.append((error, f"{n} after three steps: {error:.2g} away"))
        elif isinstance(w, Tensor):
            steps.append((float("inf"), f"{n} is missing in the optimized model's state_dict"))
    return [outputs, gradients, steps]


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; where only one of the two is NaN, infinite."""
    a, b = a.detach().double(), b.detach().double()
    if a.shape != b.shape:
        return float("inf")
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    return float(apart.nan_to_num(nan=float("inf")).max()) if a.numel() else 0.0


def _dense(t: Tensor) -> Tensor:
    return t.to_dense() if t.layout != torch.strided else t


def _said(what: str, plain: Tensor | None, ours: Tensor | None, where: str, floor: float = 0.0) -> tuple[float, str]:
    usual = None if not floor else torch.full((1,), floor)
    error = difference(what, plain, ours, usual).error
    error = error if error == error else float("inf")
    return error, f"{what} {where}: {error:.2g} of its largest value away"


def _rows(args: tuple) -> str:
    sizes = [t.shape[0] for t in pytree.tree_leaves(args) if isinstance(t, Tensor) and t.ndim]
    return str(sizes[0]) if sizes else "?"


def _reasons(report: Report) -> list[tuple[str, str, str, str, int]]:
    counts: dict[tuple, list] = {}
    for r in report.skipped():
        counts.setdefault((r.kind, r.status, r.reason), []).append(r.location)
    return [(*key, next((w for w in where if w), ""), len(where)) for key, where in counts.items()]


def _raised(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    last = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:600]}{last}"


# --- speed -------------------------------------------------------------------------------------------------------------------


def _speeds(opt: nn.Module, optim, case: Case, plan: Any, seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of a training step, and ratios (above 1: ours is faster)."""
    steps = {"ours": _step(opt.train(), optim, case), "plain": _step(*_plain(case, False), case)}
    model, adagrad = _plain(case, True)
    steps["sparse"] = _step(model, adagrad, case)
    try:
        steps["sparse"](0)
    except (RuntimeError, NotImplementedError, TypeError):  # some models cannot be trained with sparse gradients at all
        del steps["sparse"]
    applied, found = opt.report.coverage.get("updates", (0, 0))
    if "sparse" in steps and applied < found:  # then what the user's own sparse=True does for those tables must be kept
        sparse = copy.deepcopy(model)
        steps["ours on sparse"] = _step(*_optimized(sparse, case, plan), case)
    ms = interleaved(steps, seconds, clock)
    result = {"ours_ms": ms["ours"], "plain_ms": ms["plain"], "dense_ratio": ms["plain"] / ms["ours"]}
    if "sparse" in ms:
        ours = ms.get("ours on sparse", ms["ours"])
        result.update(sparse_ms=ms["sparse"], ours_sparse_ms=ours, sparse_ratio=ms["sparse"] / ours)
    return result


def _plain(case: Case, sparse: bool) -> tuple:
    model = copy.deepcopy(case.model).train()
    for table in model.modules():
        if sparse and isinstance(table, (nn.Embedding, nn.EmbeddingBag)):
            table.sparse = True
    return model, torch.optim.Adagrad(model.parameters(), lr=LR, eps=EPS)


def _step(model: nn.Module, optimizer, case: Case) -> Callable[[int], None]:
    def step(i: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        outputs = [o for o in pytree.tree_leaves(model(*case.calls()[i % len(case.batches)], **case.kwargs)) if isinstance(o, Tensor)]
        sum(o.mean() for o in outputs if o.requires_grad).backward()  # type: ignore[union-attr]
        optimizer.step()

    return step


def interleaved(calls: dict[str, Callable[[int], None]], seconds: float, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Median milliseconds of each call, all taken in turn (the order reversed every other round), for about ``seconds`` of
    ``clock``. Before each there is one that is not counted, so that it finds the caches as in a loop of its own, not as the others left them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(2):
        for call in calls.values():
            call(i)
    started, i = clock(), 0
    while i < _ROUNDS or (i < 200 and clock() - started < seconds):
        for name in list(calls) if i % 2 == 0 else list(calls)[::-1]:
            calls[name](i)
            before = clock()
            calls[name](i)
            times[name].append((clock() - before) * 1e3)
        i += 1
    return {name: statistics.median(t) for name, t in times.items()}
