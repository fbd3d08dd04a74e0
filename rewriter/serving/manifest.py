"""``manifest.json``: what a version of a served model consists of, and the checks that its files are what was exported.

    <model>/CURRENT                 the name of the version that is served, replaced atomically
    <model>/<version>/manifest.json
    <model>/<version>/model.onnx    the whole evaluation graph, lookups as ops of the domain "ai.tablewright"
    <model>/<version>/dense.onnx    standard ops only: inputs are the model's own (those still needed) and one rows tensor a lookup
    <model>/<version>/pre.onnx      only where ids are computed in the graph: from inputs to ids
    <model>/<version>/shared.onnx   only with shared inputs: what is computed once for a request with one user
    <model>/<version>/tables/...    raw rows (``kernels/gather/tables.py``)
    <model>/<version>/ids.npz       only with dynamic ids: which id each row of such a table has, ascending
    <model>/<version>/parity.npz    recorded inputs and outputs of the training model

A version never changes once it has its name. Imports no torch.
"""
from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels.errors import CorruptShard, VersionSkew
from ...kernels.gather.tables import Table
from ..errors import ExportError

FORMAT = 1
NAME = "manifest.json"
CURRENT = "CURRENT"


@dataclass(frozen=True)
class Manifest:
    """One version. ``raw`` is the whole JSON object; ``root`` the version's directory."""

    root: Path
    raw: Mapping[str, Any]
    tables: Mapping[str, Table]

    @property
    def model(self) -> str:
        return self.raw["model"]

    @property
    def version(self) -> str:
        return self.raw["version"]

    @property
    def digest(self) -> str:
        """Pins everything: the checksums of all files are part of what it is computed from."""
        return self.raw["digest"]

    @property
    def base(self) -> Path | None:
        """Directory of the version that this one is a delta of."""
        return None if self.raw["base"] is None else self.root.parent / self.raw["base"]["version"]

    def graph_files(self) -> Iterator[tuple[Path, int, int, str]]:
        """Everything but rows: path, offset (0), bytes and sha256."""
        for name, each in self.raw["files"].items():
            yield self.root / name, 0, each["bytes"], each["sha256"]

    def row_files(self, served: Callable[[int, int], bool]) -> Iterator[tuple[Path, int, int, str]]:
        """The rows' parts of files, of a delta with its base's; of shards only those with ``served(table, shard)``, in numbers."""
        for number, table in enumerate(self.tables.values()):
            shards = [(self.base or self.root, s) for k, s in enumerate(table.shards) if served(number, k)]
            if table.changes is not None:
                shards += [(self.root, table.changes.ids), (self.root, table.changes.rows)]
            for home, shard in shards:
                yield home / shard.file, shard.offset, shard.bytes, shard.sha256

    def verify(self, how: str = "full", served: Callable[[int, int], bool] = lambda table, shard: True, rows: bool = True) -> None:
        """Raises :class:`CorruptShard` naming the first file that is not what was exported. ``how``: "full" compares checksums
        (about 1 GB/s), "size" only sizes, which does not notice a flipped bit."""
        if how not in ("full", "size"):
            raise ValueError(f"verify is {how!r}; it must be 'full' or 'size'")
        for path, offset, size, sha256 in (*self.graph_files(), *(self.row_files(served) if rows else ())):
            found = path.stat().st_size if path.is_file() else -1
            if found < offset + size:
                has = "is missing" if found < 0 else f"has {found} bytes"
                raise CorruptShard(f"{path} {has}; the manifest says {offset + size} bytes at least. Copy or export the version again")
            if how == "full" and (got := sha256_of(path, offset, size)) != sha256:
                where = f"bytes {offset} to {offset + size} of {path}" if offset else f"{path}"
                raise CorruptShard(f"{where}: sha256 is {got[:16]}..., and the manifest says {sha256[:16]}.... Copy or export the version again")


def digest_of(raw: Mapping[str, Any]) -> str:
    """sha256 of the manifest without its digest, as JSON with sorted keys and no spaces."""
    plain = {k: v for k, v in raw.items() if k != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of(path: Path, offset: int, size: int) -> str:
    """Checksum of a part of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(offset)
        while size and (chunk := file.read(min(size, 1 << 20))):
            found.update(chunk)
            size -= len(chunk)
    return found.hexdigest()


def read(directory: str | os.PathLike) -> Manifest:
    """The manifest of a version's directory, or of a model's by way of its ``CURRENT``.

    Raises :class:`~tablewright.ExportError` where there is none, :class:`CorruptShard` or :class:`VersionSkew` for one that cannot
    be trusted."""
    root = Path(directory)
    if not (root / NAME).is_file():
        root = root / current(root)
    path = root / NAME
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ExportError(f"{root} has no {NAME}: it is not an exported version, or its export did not finish") from None
    except ValueError as error:
        raise CorruptShard(f"{path} is not valid JSON ({error}). Copy or export the version again") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else None
        raise VersionSkew(f"{path} has format {found!r}; this version of Tablewright reads format {FORMAT}. Upgrade, or export again")
    if digest_of(raw) != raw.get("digest"):
        raise CorruptShard(f"{path} does not have the digest that it says: it was edited or damaged. Copy or export the version again")
    manifest = Manifest(root, raw, {name: Table.from_dict(name, t) for name, t in raw["tables"].items()})
    base = manifest.base
    if base is not None:
        known = read(base).digest if (base / NAME).is_file() else None
        if known != raw["base"]["digest"]:
            what = "is not there" if known is None else f"is another one (digest {known[:12]})"
            raise VersionSkew(f"{root} is a delta of version '{base.name}' with digest {raw['base']['digest'][:12]}, which {what}")
    return manifest


def current(model: Path) -> str:
    """The name in ``CURRENT``. Raises ExportError."""
    try:
        return (model / CURRENT).read_text().strip()
    except FileNotFoundError:
        raise ExportError(f"{model} is neither an exported version (no {NAME}) nor a model's directory (no {CURRENT})") from None


def set_current(model: Path, version: str) -> None:
    """Make ``version`` the one that is served from now on. Atomic: readers see the old name or the new one."""
    if not (model / version / NAME).is_file():
        raise ExportError(f"{model} has no version '{version}'")
    temporary = model / f".{CURRENT}.{os.getpid()}.{threading.get_ident()}"
    with open(temporary, "w") as file:
        file.write(version + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, model / CURRENT)
    sync(model)


def sync(directory: Path) -> None:
    """Have the directory's entries on disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
