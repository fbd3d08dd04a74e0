"""Snapshots of models whose tables the plan keeps elsewhere: complete or absent, whatever happens while one is written."""
from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..kernels.tiers import TierError
from . import device_tables
from .errors import PlanError

if TYPE_CHECKING:
    from .tiers import TieredTables

MANIFEST = "snapshot.json"


def snapshot(tables: TieredTables, folder: str | Path, model: nn.Module, optimizers: Iterable[Optimizer]) -> Path:
    """See :meth:`~.optimized_model.OptimizedModel.snapshot`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {name: tiered.cache.prepare() for name, tiered in tables.files.items()}
    in_memory = device_tables.in_memory(tables.files)
    number = max((int(p.stem.partition("-")[2]) for p in folder.glob("dense-*.pt")), default=0) + 1
    dense = folder / f"dense-{number}.pt"
    elsewhere = {id(model.get_parameter(n)) for n in tables.open}
    named = {n: p.detach() for n, p in [*model.named_parameters(), *model.named_buffers()] if id(p) not in elsewhere}
    with tables.without_rows():
        held = {name: table.state() for name, table in tables.dynamic.items()}
        torch.save({"model": named, "dynamic": held, "optimizers": [o.state_dict() for o in optimizers]}, dense)
    _durable(dense)
    in_files = {n: {"path": os.path.abspath(tables.storage_of(n).path), "generation": g} for n, g in numbers.items() if n not in in_memory}
    said = {"dense": dense.name, "tables": in_files}
    rows = folder / f"rows-{number}.pt"
    if in_memory:
        device_tables.save_rows(in_memory, rows)
        _durable(rows)
        said["rows"] = rows.name
    made = folder / (MANIFEST + ".new")
    made.write_text(json.dumps(said, indent=2))
    _durable(made)
    os.replace(made, folder / MANIFEST)  # from here on it is complete
    _durable(folder)
    for tiered in tables.files.values():
        tiered.cache.finish()
    for old in (*folder.glob("dense-*.pt"), *folder.glob("rows-*.pt")):
        if old not in (dense, rows):
            old.unlink()
    return folder / MANIFEST


def restore(tables: TieredTables, folder: str | Path, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """See :meth:`~.optimized_model.OptimizedModel.restore`."""
    folder, optimizers = Path(folder), list(optimizers)
    said = _read_manifest(folder)
    in_memory = device_tables.in_memory(tables.files)
    for name, tiered in tables.files.items():
        if name in in_memory:
            continue
        wanted, at = said["tables"].get(name, {}).get("generation"), tiered.cache.counters().generation
        if wanted != at:
            raise TierError(f"table '{name}' is at snapshot {at}, and {folder} holds {wanted}: open it with storage.resume: {folder}")
    kept = torch.load(folder / said["dense"], weights_only=True)
    if len(kept["optimizers"]) != len(optimizers):
        raise TierError(f"{folder} holds the state of {len(kept['optimizers'])} optimizers; {len(optimizers)} were given")
    dynamic = kept.get("dynamic", {})
    if dynamic.keys() != tables.dynamic.keys():
        raise TierError(f"{folder} holds tables with dynamic ids {sorted(dynamic)}; the plan has {sorted(tables.dynamic)}")
    named = dict([*model.named_parameters(), *model.named_buffers()])
    if unknown := sorted(kept["model"].keys() - named.keys()):
        raise TierError(f"{folder} holds {unknown[0]}, which the model has not: it is a snapshot of another model")
    if in_memory or "rows" in said:
        device_tables.load_rows(in_memory, folder / said.get("rows", "rows"))
    for name, state in dynamic.items():
        tables.dynamic[name].load(**state)
    with torch.no_grad():
        for name, value in kept["model"].items():
            named[name].copy_(value)
    for optimizer, state in zip(optimizers, kept["optimizers"]):
        with tables.without_rows():
            optimizer.load_state_dict(state)


def generation_of(folder: Path) -> int:
    """The number of the snapshot that a folder holds; 0 for none."""
    try:
        with open(folder / "rows.dat", "rb") as file:
            return int.from_bytes(file.read(40)[32:40], "little")
    except FileNotFoundError:
        return 0


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise TierError(f"{folder} holds no snapshot of a model: {error}") from None


def from_manifest(folder: Path, name: str, path: Path) -> int:
    """The number of the snapshot of table ``name``, kept in ``path``, that belongs to the one in ``folder``. Raises :class:`PlanError`."""
    try:
        said = _read_manifest(folder)["tables"]
    except TierError as error:
        raise PlanError(f"table '{name}': storage.resume: {error}") from None
    if name not in said or said[name]["path"] != os.path.abspath(path):
        held = ", ".join(f"{n} in {t['path']}" for n, t in said.items())
        raise PlanError(f"table '{name}': the snapshot in {folder} is of {held or 'no table'}; wanted {name} in {os.path.abspath(path)}")
    return said[name]["generation"]


def _durable(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
