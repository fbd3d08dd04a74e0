"""Parts of a plan from plain values, the mappings that YAML and JSON hold; and the words in which a wrong value is refused."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
        refuse_unknown(key, known, where, "key")
    for key in [f.name for f in parts if f.default is MISSING] if needed is None else needed:
        if key not in raw:
            raise PlanError(f"{where} says no {key}; it must, as in {example}")
    try:
        return cls(**raw)
    except PlanError as error:
        raise PlanError(f"{where[: where.rfind('.') + 1]}{error}") from None


def is_number(value: Any) -> bool:
    """A finite one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) != float("inf")


def expect(ok: bool, where: str, value: Any, needed: str) -> None:
    """Raises :class:`PlanError` unless ``ok``."""
    if not ok:
        raise PlanError(f"{where} is {value!r}; it must be {needed}")


def refuse_unknown(key: Any, known: Iterable[str], where: str, what: str) -> None:
    """Raises :class:`PlanError` with the nearest match where ``key`` is none of those ``known``."""
    if key not in known:
        raise PlanError(f"{where} has no {what} '{key}'{nearest(str(key), known)}. Known: {', '.join(known)}")


def number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-8`` (no dot) as a string; people mean the number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def plain(value: Any) -> Any:
    """As YAML and JSON hold it."""
    return list(value) if isinstance(value, tuple) else value
