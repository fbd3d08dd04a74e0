"""Index tensors of the plain model whose values were read when its graph was rewritten: a call must notice if they change.

A rewritten interaction knows its pairs as numbers. Where they came from tensors that the model keeps (a mask, ``tril_indices``),
the op is given those tensors and a digest of their values. On a CPU it compares the values with a copy at each call (a microsecond
for the indices of hundreds of pairs); elsewhere that would wait for the device, so there it compares versions, which writes through
``.data`` leave as they are. The digest is taken again after a change, a move to another device or a copy.
"""
from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_MOST_COMPARED = 1 << 14  # numbers of a tensor that are compared one by one at each call: a few microseconds

# by digest: each tensor that had these values, with a copy of them or, where they are not compared, its version
_seen: dict[str, list[tuple[weakref.ref, Tensor | int]]] = {}


def digest(constants: Sequence[Tensor]) -> str:
    """A short text for the values of ``constants``; "" for none."""
    if not constants:
        return ""
    state = hashlib.sha256()
    for tensor in constants:
        state.update(f"{tuple(tensor.shape)}{tensor.detach().cpu().tolist()}".encode())
    return state.hexdigest()[:16]


def unchanged(constants: Sequence[Tensor] | None, expected: str) -> None:
    """Raise RuntimeError if the values of ``constants`` are not those whose digest is ``expected``."""
    if not constants or any(isinstance(t, FakeTensor) or t.is_meta for t in constants):
        return
    known = _seen.get(expected)
    if known is not None and all(ref() is t and _same(t, seen) for (ref, seen), t in zip(known, constants)):
        return
    if digest(constants) != expected:
        raise RuntimeError(
            "an index tensor or mask that chooses the pairs of an interaction has changed since optimize() read it; "
            "call optimize() again on the changed model"
        )
    _seen[expected] = [(weakref.ref(t), t.detach().clone() if _compared(t) else _version(t)) for t in constants]


def _compared(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.numel() <= _MOST_COMPARED


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _same(tensor: Tensor, seen: Tensor | int) -> bool:
    if isinstance(seen, int):
        return _version(tensor) == seen
    return tensor.dtype == seen.dtype and tensor.device == seen.device and torch.equal(tensor, seen)
