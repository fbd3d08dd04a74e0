"""What ``tw.pipeline`` does with batches on the CPU for a model on a GPU: one packed, pinned copy a batch, beside the batch that computes.

Tensors of a batch, in containers that ``torch.utils._pytree`` knows (and dataclasses that the capture took), arrive on the model's device;
all else, and tensors that are elsewhere already, stays as it is. A model on the CPU gets its batches as the loader made them.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ..kernels.packed_copy import Arriving, can_pack


class InputCopies:
    """For the batches of one pipeline. ``device``: where the model is, or None: nothing is copied."""

    def __init__(self, model: nn.Module) -> None:
        devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
        self.device = devices.pop() if len(devices) == 1 else None
        self._stream: torch.cuda.Stream | None = None

    def start(self, batch: Any) -> tuple[Any, Arriving | None]:
        """``batch`` with its tensors on the device, to be read after ``join()`` of what comes beside it (None: nothing was copied)."""
        if self.device is None:
            return batch, None
        leaves, spec = pytree.tree_flatten(batch)
        chosen = {id(leaf): leaf for leaf in leaves if can_pack(leaf)}
        if not chosen:
            return batch, None
        if self.device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        arriving = Arriving(list(chosen.values()), self.device, self._stream)
        copies = dict(zip(chosen, arriving.tensors))
        return pytree.tree_unflatten([copies.get(id(leaf), leaf) for leaf in leaves], spec), arriving
