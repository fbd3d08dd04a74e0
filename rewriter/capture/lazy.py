"""Attributes that forward() fills once, at its first call: a table of hashes, a mask, positions.

A capture of the first call would hold what only the first call does. Where the value does not depend on the batch (two
batches and two random seeds give the same bits) it is put on the shell beforehand, as the first call would have done.
"""
from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .check import undisturbed
from .program_check import copied, kept, leaves_of, one_more_row


def fill_lazy_attributes(shell: nn.Module, entry: str, batches: list[tuple[tuple, dict]]) -> list[str]:
    """Names of the attributes that were put on ``shell``; nothing else of it changes."""
    other = batches[1] if len(batches) > 1 else one_more_row(batches[0])
    if other is None:
        return []
    try:
        first, second = (_made(shell, entry, batch, seed) for seed, batch in enumerate((batches[0], other)))
    except Exception:  # the plain model fails: whoever asked says so
        return []
    filled = []
    for key, value in first.items():
        if key in second and _same(value, second[key]):
            path, name = key
            shell.get_submodule(path).__dict__[name] = value
            filled.append(f"{path}.{name}".lstrip("."))
    return filled


def _made(shell: nn.Module, entry: str, batch: tuple, seed: int) -> dict[tuple[str, str], Any]:
    with undisturbed(), kept(shell), torch.no_grad():
        torch.manual_seed(seed)
        before = {path: dict(module.__dict__) for path, module in shell.named_modules()}
        args, kwargs = copied(batch)
        getattr(shell, entry)(*args, **kwargs)
        return {
            (path, name): copy.deepcopy(value)
            for path, module in shell.named_modules() for name, value in module.__dict__.items()
            if value is not None and before[path].get(name, None) is None and not name.startswith("_tablewright")
        }


def _same(a: Any, b: Any) -> bool:
    mine, theirs = list(leaves_of(a)), list(leaves_of(b))
    if not mine or [path for path, _ in mine] != [path for path, _ in theirs]:
        return False
    return all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else type(x) is type(y) and x == y
        for (_, x), (_, y) in zip(mine, theirs)
    )
