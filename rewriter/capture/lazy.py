"""Attributes that forward() fills once, at its first call: a table of hashes, a mask, positions.

A capture of the first call would hold what only the first call does. Where the value does not depend on the batch (several
batches and random seeds give the same bits) it is put on the shell beforehand, as the first call would have done.
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
    others = [*batches[1:2], one_more_row(batches[0]), one_more_row(batches[0], only=True)]
    if any(each is None for each in others[-2:]):
        return []
    try:
        first, *rest = (_made(shell, entry, batch, seed) for seed, batch in enumerate((batches[0], *others)))
    except Exception:  # the plain model fails: whoever asked says so
        return []
    filled = []
    for key, value in first.items():
        if all(key in second and _same(value, second[key]) for second in rest):
            path, name = key
            shell.get_submodule(path).__dict__[name] = value
            filled.append(f"{path}.{name}".lstrip("."))
    return filled


def _made(shell: nn.Module, entry: str, batch: tuple, seed: int) -> dict[tuple[str, str], Any]:
    """What a first call puts where None or nothing was, and a second one leaves alone."""
    with undisturbed(), kept(shell), torch.no_grad():
        torch.manual_seed(seed)
        modules = dict(shell.named_modules())
        before = {path: dict(module.__dict__) for path, module in modules.items()}
        args, kwargs = copied(batch)
        getattr(shell, entry)(*args, **kwargs)
        made = {(path, name): value for path, module in modules.items() for name, value in module.__dict__.items()
                if value is not None and before[path].get(name) is None and not name.startswith("_tablewright")
                and any(isinstance(leaf, torch.Tensor) for _, leaf in leaves_of(value))}
        copies = {key: copy.deepcopy(value) for key, value in made.items()}
        args, kwargs = copied(batch)
        getattr(shell, entry)(*args, **kwargs)
        return {(path, name): value for (path, name), value in copies.items()
                if modules[path].__dict__.get(name) is made[path, name] and _same(made[path, name], value)}


def _same(a: Any, b: Any) -> bool:
    mine, theirs = list(leaves_of(a)), list(leaves_of(b))
    if not mine or [path for path, _ in mine] != [path for path, _ in theirs]:
        return False
    return all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else type(x) is type(y) and x == y
        for (_, x), (_, y) in zip(mine, theirs)
    )
