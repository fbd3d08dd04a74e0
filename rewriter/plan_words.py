"""Parts of a plan from plain values: the mappings that YAML and JSON hold."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from .errors import PlanError, nearest

_Part = TypeVar("_Part")


def part_from(cls: type[_Part], raw: Any, where: str, example: str, needed: Sequence[str] | None = None) -> _Part:
    """The dataclass ``cls`` from a mapping of its fields, or itself. ``where``: the keys that lead to it, ``tables.user*.storage``;
    ``example``: what one could have written; ``needed``: the keys that must be there (by default those without a default).

    Raises :class:`PlanError` naming the key and its nearest match; errors of ``cls`` itself get their place put before them.
    """
    if isinstance(raw, cls):
        return raw
    if not isinstance(raw, Mapping):
        raise PlanError(f"{where} is {raw!r}; it must be a mapping such as {example}")
    parts: Any = fields(cls)  # type: ignore[arg-type]
    known = [f.name for f in parts]
    for key in raw:
        if key not in known:
            raise PlanError(f"{where} has no key '{key}'{nearest(str(key), known)}. Known: {', '.join(known)}")
    for key in [f.name for f in parts if f.default is MISSING] if needed is None else needed:
        if key not in raw:
            raise PlanError(f"{where} says no {key}; it must, as in {example}")
    try:
        return cls(**raw)
    except PlanError as error:
        raise PlanError(f"{where[: where.rfind('.') + 1]}{error}") from None
