"""Tables whose cache is on a device: opening them, what stands in for them in a capture, and rows of the host's memory in snapshots.

``storage: {cache: 12GB, cache_on: cuda, backing: host}`` (``storage.py``; the cache itself is ``kernels/tiers/device.py``).
"""
from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..kernels.memory import one_row
from ..kernels.tiers import Part, TierError
from ..kernels.tiers.cache import HostRows
from ..kernels.tiers.device import DeviceCache, DeviceTable
from ..kernels.tiers.table import TieredTable
from .errors import PlanError
from .storage import Storage

_CHUNK = 1 << 26  # bytes of rows that are copied at once


def check(name: str, storage: Storage, table: Tensor) -> None:
    """Raises :class:`PlanError` where ``table`` cannot have a cache on the plan's device."""
    if table.dtype != torch.float32 or table.device.type != storage.cache_on:
        raise PlanError(
            f"table '{name}' is to be in tiers with cache_on: {storage.cache_on}, and is {table.dtype} on {table.device}; float32 on "
            f"{storage.cache_on} was needed, as the rest of the model (tables on the meta device go to where that is)"
        )


def stand_in(shell: nn.Module, table: nn.Parameter) -> nn.Parameter:
    """For a table on the meta device: zeros where the rest of the model is."""
    devices = {t.device for t in (*shell.parameters(), *shell.buffers()) if not t.is_meta}
    return one_row(table.shape, table.dtype, devices.pop() if len(devices) == 1 else torch.device("cpu"), table.requires_grad)


def memory(name: str, storage: Storage, device: torch.device, slots: int, parts: Sequence[Part]) -> list[Tensor]:
    """Tensors ``[slots, width]`` on ``device`` for each part. Raises :class:`PlanError` where there is no room for them."""
    try:
        return [torch.zeros(slots, p.width, device=device) for p in parts]
    except torch.OutOfMemoryError as error:
        raise PlanError(f"table '{name}': storage.cache is {int(storage.cache) / 1e9:.2f} GB, for which {device} has no room: {error}") from None


def over_memory(name: str, storage: Storage, rows: int, parts: Sequence[Part], slots: Sequence[Tensor]) -> DeviceCache:
    """A cache over the host's memory. Raises :class:`PlanError` where that cannot hold all rows."""
    size, there = rows * sum(4 * p.width for p in parts), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > there:
        raise PlanError(
            f"table '{name}': {rows:,} rows with their optimizer state take {size / 1e9:.1f} GB, and the machine has {there / 1e9:.1f} GB of memory: "
            "say backing: ssd and a path"
        )
    return DeviceCache(HostRows(rows, parts), rows, parts, len(slots[0]), seed=storage.seed, policy=storage.policy, memory=slots)


def in_memory(tables: Mapping[str, TieredTable]) -> dict[str, tuple[DeviceTable, HostRows]]:
    """Those of ``tables`` whose rows are in the host's memory."""
    return {n: (t, t.cache.host_rows) for n, t in tables.items() if isinstance(t, DeviceTable) and t.cache.host_rows is not None}


def save_rows(tables: Mapping[str, tuple[DeviceTable, HostRows]], path: Path) -> None:
    """Write all rows, with the state of their optimizer, after ``prepare()`` of their caches."""
    torch.save({name: {"records": rows.records, "written": rows.written, "about": table.cache.about} for name, (table, rows) in tables.items()}, path)


def load_rows(tables: Mapping[str, tuple[DeviceTable, HostRows]], path: Path) -> None:
    """Take rows from a file of :func:`save_rows`, a few at a time. Raises :class:`TierError`, before anything changes, where it is damaged or
    of other tables, and while batches are under way."""
    try:
        kept = torch.load(path, weights_only=True, mmap=True)
        found = {n: t["about"] for n, t in kept.items()}
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise TierError(f"{path} cannot be read ({str(error).partition(chr(10))[0]}): it is missing, damaged or truncated; restore the snapshot from a copy") from None
    wanted = {n: table.cache.about for n, (table, _) in tables.items()}
    if found != wanted:
        raise TierError(f"{path} holds other tables in the host's memory: {found}; the plan has {wanted}")
    for name, (table, _) in tables.items():
        if under_way := table.cache.counters().batches:
            raise TierError(f"table '{name}': {under_way} lookups wait for their update; call step() first, and end the pipeline")
    for name, (table, home) in tables.items():
        table.cache.forget()
        records, written = kept[name]["records"], kept[name]["written"]
        step = max(8, _CHUNK // (4 * home.records.shape[1]) // 8 * 8)
        for first in range(0, len(home.records), step):
            if bool(written[first // 8 : (first + step) // 8].any()):  # rows that were never written take no memory
                home.records[first : first + step] = records[first : first + step]
        home.written.copy_(written)
        table.cache.forget()  # counts what is there now
        table.start_padding()
