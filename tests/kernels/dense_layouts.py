"""Matrices that lie in memory in every way that the products in C++ read without a copy, and in some that they copy first."""
from __future__ import annotations

import torch

LAYOUTS = {
    "rows": lambda rows, cols: torch.randn(rows, cols),
    "columns": lambda rows, cols: torch.randn(cols, rows).t(),
    "part of a wider matrix": lambda rows, cols: torch.randn(rows, cols + 7)[:, 3:-4],
    "part of a higher matrix": lambda rows, cols: torch.randn(cols, rows + 5).t()[2:-3],
    "every other": lambda rows, cols: torch.randn(rows, 2 * cols)[:, ::2],
    "one row for all": lambda rows, cols: torch.randn(1, cols).expand(rows, cols),
    "one column for all": lambda rows, cols: torch.randn(rows, 1).expand(rows, cols),
}
