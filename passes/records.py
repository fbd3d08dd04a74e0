"""What a pass says of each thing it found: the rows of the report."""
from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from .origin import KEY, Origin

APPLIED = "APPLIED"
SKIPPED = "SKIPPED"  # found, but it may not or need not be rewritten; the reason says why
REJECTED = "REJECTED"  # rewritten, but a check failed: rolled back
DISABLED = "DISABLED"  # by the plan

# What a rewrite does to the numbers: same bits; the same sums in another order; something else on purpose.
NUMERICS = ("exact", "reassociated", "approximate")


@dataclass(frozen=True)
class Record:
    """One thing found in the model. ``kind`` counts in ``report.coverage`` ("lookups", "mlps", ...); ``subject`` is its module
    path in the plain model; ``detail`` says what was made of it; ``reason`` why it was not rewritten."""

    kind: str
    status: str
    subject: str
    rule: str
    reason: str = ""
    detail: str = ""
    location: str = ""
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skip:
    """Why a rewrite does not apply: ``reason`` is "what is; what was needed", ``node`` the guilty one."""

    reason: str
    node: Node | None = None


def skip(reason: str, at: Node | None = None) -> Skip:
    """Return this from ``check`` or ``key``: found, not rewritten, and this is why."""
    return Skip(reason, at)


def record(rule: str, kind: str, status: str, node: Node, reason: str = "", detail: str = "", subject: str | None = None) -> Record:
    """A row about ``node``, placed by its origin."""
    origin: Origin = node.meta.get(KEY) or Origin((), "")
    path = origin.module_path if subject is None else subject
    return Record(kind, status, path, rule, reason, detail, origin.location, (node.name,))
