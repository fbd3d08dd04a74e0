"""What is known of a served table, and how its stored rows are read. numpy only: a serving image has no torch.

A row is stored little-endian, without a header, in one of the forms of ``kernels/codecs``:

| ``row_dtype`` | bytes a row | |
|---|---|---|
| ``float32`` | ``4 * dim`` | the values |
| ``float16``, ``bfloat16`` | ``2 * dim`` | the values in that type |
| ``int8_rowwise`` | ``dim + 8`` | ``dim`` codes (uint8), then float32 ``scale`` and ``offset``: a value is ``code * scale + offset`` |
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import VersionSkew

CODECS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8_rowwise": "int8"}  # row_dtype -> kernels/codecs
_STORED = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2"), "int8_rowwise": np.dtype("u1")}


@dataclass(frozen=True)
class Shard:
    """Rows ``first .. first + rows - 1`` of a table: ``bytes`` of ``file`` (relative to the version's directory) from ``offset`` on."""

    file: str
    offset: int
    first: int
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Changes:
    """The rows of a delta version that differ from its base: ``ids`` (int64, ascending) and ``rows``, each a raw file."""

    ids: Shard
    rows: Shard


@dataclass(frozen=True)
class Table:
    """One table of a version. ``missing`` says what stands for an id that is no row: "error", "zeros", "mean" or "row:<id>"."""

    name: str
    rows: int
    dim: int
    row_dtype: str = "float32"
    missing: str = "error"
    shards: tuple[Shard, ...] = ()
    changes: Changes | None = None
    stored: np.dtype = field(init=False, repr=False, compare=False)  # dtype and width of a stored row as an array
    width: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.row_dtype not in _STORED:
            raise VersionSkew(f"table '{self.name}' has row_dtype '{self.row_dtype}'; this version of Tablewright reads {', '.join(_STORED)}")
        object.__setattr__(self, "stored", _STORED[self.row_dtype])
        object.__setattr__(self, "width", self.dim + 8 if self.row_dtype == "int8_rowwise" else self.dim)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return self.width * self.stored.itemsize

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        out: dict[str, Any] = {"rows": self.rows, "dim": self.dim, "row_dtype": self.row_dtype, "row_bytes": self.row_bytes,
                               "missing": self.missing, "shards": [vars(s) for s in self.shards]}
        if self.changes is not None:
            out["changes"] = {"ids": vars(self.changes.ids), "rows": vars(self.changes.rows)}
        return out

    @staticmethod
    def from_dict(name: str, raw: dict[str, Any]) -> Table:
        """The table that :meth:`to_dict` wrote."""
        changes = raw.get("changes")
        return Table(
            name, raw["rows"], raw["dim"], raw["row_dtype"], raw["missing"], tuple(Shard(**s) for s in raw["shards"]),
            None if changes is None else Changes(Shard(**changes["ids"]), Shard(**changes["rows"])),
        )  # fmt: skip


def decode(rows: np.ndarray, table: Table) -> np.ndarray:
    """Stored rows ``[n, table.width]`` of ``table.stored`` -> float32 ``[n, table.dim]``; for float32 ``rows`` itself."""
    if table.row_dtype == "float32":
        return rows
    if table.row_dtype == "float16":
        return rows.astype(np.float32)
    if table.row_dtype == "bfloat16":
        wide = rows.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    tail = np.ascontiguousarray(rows[:, table.dim :]).view("<f4")
    values = rows[:, : table.dim].astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # a row that held NaN or infinity decodes to NaN
        values *= tail[:, :1]
        values += tail[:, 1:]
    return values
