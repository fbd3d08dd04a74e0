"""Run a plain model whose tables are stand-ins of zeros: the rows that it reads are brought when it is about to read them.

Only what the sample looks up is fetched, and takes memory; a table that is read in another way is fetched whole.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...passes.graph import aten

Fetch = Callable[[str, Tensor], Tensor]  # name of a table, ids [n] -> rows [n, dim]
_IDS = {aten.embedding.default: 1, aten._embedding_bag.default: 1, aten._embedding_bag_forward_only.default: 1, aten.index_select.default: 2}


class RowsOnDemand(TorchDispatchMode):
    """``tables``: the stand-ins by name, which are filled from ``fetch``. What is fetched stays."""

    def __init__(self, tables: Mapping[str, Tensor], fetch: Fetch) -> None:
        super().__init__()
        self._fetch, self._tables = fetch, {t.untyped_storage().data_ptr(): (name, t.detach()) for name, t in tables.items() if t.numel()}
        self._whole: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in pytree.tree_leaves((args, kwargs or {})):
            if isinstance(leaf, Tensor) and leaf.numel() and (found := self._tables.get(leaf.untyped_storage().data_ptr())) is not None:
                name, table = found
                ids = _ids(func, args) if leaf.shape == table.shape and leaf.stride() == table.stride() else None
                if ids is not None:
                    self.fill(name, ids)
                elif not func.is_view and func is not aten.detach.default:
                    self.fill(name)
        return func(*args, **(kwargs or {}))

    def fill(self, name: str, ids: Tensor | None = None) -> None:
        """Bring the rows ``ids`` of table ``name``, or all of them."""
        table = next((t for n, t in self._tables.values() if n == name), None)
        if table is None or name in self._whole:
            return
        if ids is None:
            self._whole.add(name)
        wanted = torch.arange(len(table)) if ids is None else torch.where(ids < 0, ids + len(table), ids).flatten().long().unique()
        wanted = wanted[(wanted >= 0) & (wanted < len(table))]  # the model itself says what is wrong with others
        table[wanted] = self._fetch(name, wanted)


def _ids(func: Any, args: tuple) -> Tensor | None:
    """The rows that ``func`` reads of its first argument; ``None``: perhaps all."""
    if func is aten.index.Tensor:
        chosen = args[1]
        return chosen[0] if len(chosen) == 1 and chosen[0] is not None and chosen[0].dtype != torch.bool else None
    if func not in _IDS or func is aten.index_select.default and args[1] != 0:
        return None
    return args[_IDS[func]]
