"""Index tensors of the plain model whose values were read when its graph was rewritten: a call must notice if they change.

A rewritten interaction knows its pairs as numbers. Where they came from tensors that the model keeps (a mask, ``tril_indices``),
the op is given those tensors and a digest of their values. It compares versions at each call (a microsecond), and values only
after a change, a move to another device or a copy.
"""
from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_seen: dict[str, list[tuple[weakref.ref, int]]] = {}


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
    versions = [-1 if t.is_inference() else t._version for t in constants]
    if known is not None and all(ref() is t and seen == v for (ref, seen), t, v in zip(known, constants, versions)):
        return
    if digest(constants) != expected:
        raise RuntimeError(
            "an index tensor or mask that chooses the pairs of an interaction has changed since optimize() read it; "
            "call optimize() again on the changed model"
        )
    _seen[expected] = [(weakref.ref(t), v) for t, v in zip(constants, versions)]
