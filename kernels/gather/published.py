"""What a key-value store must know of a version to hold it."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .tables import Table


@dataclass(frozen=True)
class Published:
    """``base``: the digest of the version that this one is a delta of. ``root``: the directory, for the ids that a delta changed."""

    model: str
    digest: str
    tables: Mapping[str, Table]
    base: str | None
    root: Path

    def changed(self) -> dict[str, np.ndarray]:
        """Ascending ids by table that are in this version and not in its base."""
        return {
            name: np.fromfile(self.root / table.changes.ids.file, dtype="<i8")
            for name, table in self.tables.items() if table.changes is not None
        }  # fmt: skip
