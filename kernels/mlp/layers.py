"""What one fused multilayer perceptron does, layer by layer, as data; and its 1-bit masks.

A layer computes ``dropout(relu(x @ weight.T + bias))``, where ReLU, dropout and bias may each be missing. The description travels
through a graph as text, so that a node stays an ordinary call that can be printed, exported and compared.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

FORMS = ("blas", "square", "wide")


@dataclass(frozen=True)
class Layer:
    """``p``: dropout's probability, 0 for none. ``form``: how a GPU makes the products with this weight, one of ``FORMS``: PyTorch's
    BLAS and a kernel for the rest, or a Triton product that does the rest at its end, in one of two tile shapes. Same results."""

    relu: bool
    p: float = 0.0
    form: str = "blas"

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"dropout's probability is {self.p}; it must be at least 0 and below 1")
        if self.form not in FORMS:
            raise ValueError(f"the form is {self.form!r}; it must be one of {FORMS}")

    def dropped(self, train: bool) -> float:
        """The probability that holds in this call."""
        return self.p if train else 0.0

    def masks(self, train: bool) -> bool:
        """Does the backward need to know which values passed?"""
        return self.relu or self.dropped(train) > 0


def encode(layers: tuple[Layer, ...]) -> str:
    """The text of some layers: ``"relu 0.2 blas,none 0.0 blas"``."""
    return ",".join(f"{'relu' if layer.relu else 'none'} {layer.p!r} {layer.form}" for layer in layers)


@functools.lru_cache(maxsize=1024)
def decode(text: str) -> tuple[Layer, ...]:
    """The inverse of :func:`encode`. Raises ValueError for any other text."""
    parts = [part.split(" ") for part in text.split(",")]
    if any(len(part) != 3 or part[0] not in ("relu", "none") for part in parts):
        raise ValueError(f"{text!r} does not describe layers")
    return tuple(Layer(function == "relu", float(p), form) for function, p, form in parts)


def words(cols: int) -> int:
    """How many 32-bit words hold a row of ``cols`` bits."""
    return -(-cols // 32)


def pack(flags: Tensor) -> Tensor:
    """bool ``[rows, cols]`` as int32 ``[rows, words(cols)]``: column ``c`` is bit ``c % 32`` of word ``c // 32``."""
    rows, cols = flags.shape
    padded = torch.zeros(rows, 32 * words(cols), dtype=torch.int64, device=flags.device)
    padded[:, :cols] = flags
    packed = (padded.view(rows, words(cols), 32) << torch.arange(32, device=flags.device)).sum(2)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack(bits: Tensor, cols: int) -> Tensor:
    """The inverse of :func:`pack`: bool ``[rows, cols]``."""
    return ((bits.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=bits.device)) & 1).flatten(1)[:, :cols] != 0
