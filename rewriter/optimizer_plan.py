"""What a plan says of the optimizer that updates tables: ``embedding_optimizer: {rowwise_adagrad: {lr: 0.01, in_backward: true}}``."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from .plan_words import expect, is_number, number, plain, refuse_unknown


@dataclass(frozen=True)
class EmbeddingOptimizer:
    """How looked-up rows are updated (formulas: ``kernels/embedding/updates.py``). ``weight_decay`` is decoupled and touches
    looked-up rows only. ``in_backward``: update when a backward ends instead of in ``embedding_optimizer.step()``; fastest and
    smallest, and refused where gradients are accumulated, clipped or scaled."""

    key: ClassVar[str] = ""
    lr: float = 0.01
    weight_decay: float = 0.0
    in_backward: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            where = f"embedding_optimizer.{self.key}.{f.name}"
            if f.name == "in_backward":
                expect(isinstance(value, bool), where, value, "true or false")
            elif f.name == "betas":
                ok = isinstance(value, (list, tuple)) and len(value) == 2 and all(is_number(b) and 0 <= b < 1 for b in value)
                expect(ok, where, value, "two numbers in [0, 1)")
                object.__setattr__(self, "betas", tuple(float(b) for b in value))
            else:
                expect(is_number(value) and value >= 0, where, value, "a number >= 0")
                object.__setattr__(self, f.name, float(value))

    def settings(self) -> dict[str, Any]:
        """Its options as plain values."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True)
class SGD(EmbeddingOptimizer):
    """``row -= lr * g``."""

    key: ClassVar[str] = "sgd"


@dataclass(frozen=True)
class Adagrad(EmbeddingOptimizer):
    """``sum += g*g; row -= lr * g / (sqrt(sum) + eps)``: torch.optim.Adagrad on looked-up rows, which is exact."""

    key: ClassVar[str] = "adagrad"
    eps: float = 1e-10


@dataclass(frozen=True)
class RowwiseAdagrad(EmbeddingOptimizer):
    """AdaGrad with one accumulator a row: ``sum += mean(g*g)``. A table's state is 1/dim of AdaGrad's."""

    key: ClassVar[str] = "rowwise_adagrad"
    eps: float = 1e-8


@dataclass(frozen=True)
class Adam(EmbeddingOptimizer):
    """Lazy Adam: moments and rows move only when looked up (torch.optim.SparseAdam's meaning, not torch.optim.Adam's)."""

    key: ClassVar[str] = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


_OPTIMIZERS: dict[str, type[EmbeddingOptimizer]] = {c.key: c for c in (SGD, Adagrad, RowwiseAdagrad, Adam)}


def check_optimizer(value: Any, where: str) -> None:
    """Raises :class:`PlanError` where ``value`` is neither ``None`` nor one of the four."""
    ok = value is None or (isinstance(value, EmbeddingOptimizer) and type(value).key)
    expect(ok, where, value, "one of tw.SGD, tw.Adagrad, tw.RowwiseAdagrad, tw.Adam (in text: {adagrad: {lr: 0.01}})")


def optimizer_from(raw: Any, where: str) -> EmbeddingOptimizer:
    """From its text form, or itself. Raises :class:`PlanError` naming the key and its nearest match."""
    if isinstance(raw, EmbeddingOptimizer):
        return raw
    expect(isinstance(raw, Mapping) and len(raw) == 1, where, raw, "one optimizer, as {adagrad: {lr: 0.01}}")
    ((key, options),) = raw.items()
    refuse_unknown(key, _OPTIMIZERS, where, "optimizer")
    cls = _OPTIMIZERS[key]
    options = {} if options is None else options
    expect(isinstance(options, Mapping), f"{where}.{key}", options, "a mapping of options")
    for option in options:
        refuse_unknown(option, [f.name for f in fields(cls)], f"{where}.{key}", "option")
    return cls(**{name: number(value) for name, value in options.items()})


def optimizer_to(value: EmbeddingOptimizer) -> dict[str, Any]:
    """Its text form."""
    return {value.key: value.settings()}
