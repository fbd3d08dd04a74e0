"""``dropout(x, p=0)`` is ``x``: many published models leave such nodes in every layer.

torch returns its input untouched for p = 0 and draws no random numbers, so the bits and the random stream stay the same.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .records import Skip, skip
from .rule import Rule


@dataclass
class RemoveZeroDropout(Rule):
    """Drop the dropouts whose probability is zero."""

    name: ClassVar[str] = "remove_zero_dropout"
    kind: ClassVar[str] = "dropouts"
    numerics: ClassVar[str] = "exact"

    def pattern(self, op, x, p):
        return op.dropout(x, p)

    def check(self, match, p) -> Skip | None:
        if p != 0:
            return skip(f"dropout with p={p} drops values; only p=0 does nothing", at=match.anchor)
        return None

    def rewrite(self, x):
        return x
