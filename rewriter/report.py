"""What was rewritten, what was not and why: the text a person reads, and the data that tests and tools read."""
from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field

from ..passes.records import APPLIED, DISABLED, REJECTED, SKIPPED, Record

_WORDS = {
    "lookups": "fused",
    "updates": "updated row by row",
    "mlps": "fused",
    "cross": "layers fused",
    "experts": "batched",
    "interactions": "fused",
    "dropouts": "removed",
    "dropout masks": "drawn faster",
    "tanh": "made faster",
    "fused mlps": "made one call",
    "looked-up interactions": "made without rows in memory",
    "pooled": "sequences fused",
    "concatenations": "merged",
    "small products": "made without copies",
    "repeats": "computed once",
    "id columns": "cut at once",
    "tiers": "tables kept in tiers",
    "dynamic ids": "mapped to rows",
    "shards": "placed",
    "overlaps": "scheduled",
    "node sums": "made inside the node first",
    "ops": "in low precision",
    "stored tables": "in their own dtype",
    "compressed tables": "made smaller",
    "wide rows": "of low tables",
    "dense updates": "parameters stepped in the backward",
    "checkpoints": "modules computed again in the backward",
}
_MAX_LINES = 25


@dataclass(frozen=True)
class Report:
    """``records``: a row for everything found. ``door``: how the model was captured ("fx", "export", "dynamo", "dynamo, in
    pieces", or "none" where it runs plainly), in how many ``pieces``. ``notes``: sentences about the capture.
    ``launches``: fused lookup calls in the graph. ``table_bytes``: of all tables read; ``copied_bytes``: of tables copied;
    ``huge_page_bytes``: of tables and their optimizer state for which huge pages were asked. ``kept_bytes``: that the
    process keeps of freed memory, at most (``kernels/memory.py``)."""

    records: tuple[Record, ...]
    door: str = ""
    pieces: int = 1
    notes: tuple[str, ...] = ()
    launches: int = 0
    table_bytes: int = 0
    copied_bytes: int = 0
    huge_page_bytes: int = 0
    kept_bytes: int = 0
    kernels: str = ""
    seconds: float = 0.0
    passes: tuple[str, ...] = field(default=())

    @property
    def coverage(self) -> dict[str, tuple[int, int]]:
        """For each kind ("lookups", "updates", "mlps", "interactions", ...): (applied, found)."""
        found = Counter(r.kind for r in self.records)
        applied = Counter(r.kind for r in self.records if r.status == APPLIED)
        kinds: list[str] = ["lookups", *(["updates"] if "updates" in found else []), "mlps", "interactions", *found]
        return {kind: (applied[kind], found[kind]) for kind in dict.fromkeys(kinds)}

    def skipped(self, rule: str | None = None) -> list[Record]:
        """Everything found and not rewritten, by one rule or by all."""
        return [r for r in self.records if r.status != APPLIED and rule in (None, r.rule)]

    def of(self, path: str) -> list[Record]:
        """The rows about the module at ``path`` or inside it (a table goes by its parameter's name)."""
        return [r for r in self.records if path == "" or r.subject == path or r.subject.startswith(path + ".")]

    def table(self) -> str:
        """Every row, in columns."""
        rows = [("KIND", "STATUS", "WHAT", "WHERE", "RULE", "WHY / HOW")]
        rows += [(r.kind, r.status, r.subject or "the model", r.location, r.rule, r.reason or r.detail) for r in self.records]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[5]]).rstrip() for row in rows)

    def to_json(self) -> str:
        """All of it, for tools."""
        return json.dumps({**asdict(self), "coverage": self.coverage}, indent=2)

    def __str__(self) -> str:
        lines = [self._summary()]
        lines += [f"  note: {note}" for note in self.notes]
        reasons: dict[tuple, list[Record]] = {}
        for r in self.skipped():
            reasons.setdefault((r.kind, r.status, r.reason), []).append(r)
        for (kind, status, reason), rows in reasons.items():
            named = ", ".join(dict.fromkeys(r.subject or "the model" for r in rows[:3])) + (", ..." if len(rows) > 3 else "")
            where = next((f" ({r.location})" for r in rows if r.location), "")
            word = {SKIPPED: "skipped", REJECTED: "REJECTED", DISABLED: "disabled"}[status]
            lines.append(f"  {len(rows)} of {kind} {word}: {named}: {reason}{where}")
        lines.append(f"  captured by {self.door}; {self.kernels}; optimize() took {self.seconds:.2f} s")
        huge = f"; huge pages asked for {_size(self.huge_page_bytes)}" if self.huge_page_bytes else ""
        kept = f"; malloc keeps up to {_size(self.kept_bytes)} of freed memory" if self.kept_bytes else ""
        lines.append(f"  tables: {_size(self.table_bytes)}, of which {_size(self.copied_bytes)} copied{huge}{kept}")
        if len(lines) > _MAX_LINES:
            hidden = len(lines) - _MAX_LINES + 3
            lines = [*lines[: _MAX_LINES - 3], f"  ... {hidden} more lines: report.table() has every row", *lines[-2:]]
        return "\n".join(lines)

    def _summary(self) -> str:
        parts = []
        for kind, (applied, found) in self.coverage.items():
            if kind == "lookups":
                groups = f" into {self.launches} group{'s' * (self.launches != 1)}" if applied else ""
                parts.append(f"{applied}/{found} lookups fused{groups}")
            elif found:
                parts.append(f"{applied}/{found} {'tables' if kind == 'updates' else kind} {_WORDS.get(kind, 'rewritten')}")
        return "; ".join(parts)


def _size(count: int) -> str:
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count} B"
