"""Row updates: what an optimizer does to one touched row, as data that every implementation (reference, CPU, Triton) reads.

``g`` is the gradient of the row, summed over all duplicates of its id first. ``t`` counts steps from 1.

========================  =====================================================================================================
``sgd``                   ``row -= lr * g``                                                                    (torch.optim.SGD)
``adagrad``               ``sum += g*g``; ``row -= lr * g / (sqrt(sum) + eps)``              (Duchi 2011; torch.optim.Adagrad)
``rowwise_adagrad``       ``sum += mean(g*g)`` (one number a row); ``row -= lr * g / (sqrt(sum) + eps)``   (FBGEMM, TorchRec)
``adam``                  ``m += (1-b1)*(g-m)``; ``v += (1-b2)*(g*g-v)``;
                          ``row -= lr*sqrt(1-b2**t)/(1-b1**t) * m / (sqrt(v) + eps)``    (Kingma 2015; torch.optim.SparseAdam)
========================  =====================================================================================================

``weight_decay`` is decoupled and touches looked-up rows only: ``row *= 1 - lr * weight_decay`` before the update (AdamW's form).
``maximize`` negates ``g``.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

KINDS = ("sgd", "adagrad", "rowwise_adagrad", "adam")


@dataclass
class TableUpdate:
    """How one table's touched rows are updated in this step.

    ``state``: () for sgd; (sum ``[rows, dim]``,) for adagrad; (sum ``[rows]``,) for rowwise_adagrad; (m, v), each
    ``[rows, dim]``, for adam. State has the table's dtype or float32 (rowwise: float32; float64 for float64 tables).
    ``lr`` is the rate of this step (schedules and decay already applied); ``step`` is ``t``.
    """

    kind: str
    lr: float
    eps: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    weight_decay: float = 0.0
    step: int = 1
    maximize: bool = False
    state: tuple[torch.Tensor, ...] = ()
