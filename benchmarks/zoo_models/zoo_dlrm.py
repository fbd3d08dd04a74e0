"""Facebook's public DLRM script (its repository on PYTHONPATH): embedding bags fed by lists of ids and offsets."""
from __future__ import annotations

import numpy as np
import torch
from torch import nn
from zoo_schema import DIM, FIELDS, ids, stand_in_for, zoo

NEEDS = ("dlrm_s_pytorch",)
stand_in_for("onnx", "mlperf_logging")

LOOKUPS = 5
# arguments beyond the common ones; the script multiplies and divides ids for "quotient remainder" and projects for "mixed dimensions"
TABLE: dict[str, dict] = {
    "dot": {}, "dot_itself": {"arch_interaction_itself": True}, "cat": {"arch_interaction_op": "cat"}, "one_id": {}, "stacked": {},
    "qr_mult": {"qr_flag": True, "qr_operation": "mult", "qr_collisions": 4, "qr_threshold": 10},
    "qr_add": {"qr_flag": True, "qr_operation": "add", "qr_collisions": 4, "qr_threshold": 10},
    "mixed_dims": {"md_flag": True, "md_threshold": 10}, "weighted_fixed": {"weighted_pooling": "fixed"}, "weighted_learned": {"weighted_pooling": "learned"},
}  # fmt: skip


def make(name: str, rows: int) -> nn.Module:
    from dlrm_s_pytorch import DLRM_Net

    np.random.seed(0)
    options = {"arch_interaction_op": "dot", **TABLE[name]}
    fields = FIELDS + 1
    products = fields * (fields + 1) // 2 if options.get("arch_interaction_itself") else fields * (fields - 1) // 2
    top = DIM * fields if options["arch_interaction_op"] == "cat" else products + DIM
    size = np.array([4, 8] * (FIELDS // 2)) if name == "mixed_dims" else DIM
    if name == "mixed_dims":
        size = np.array([4, 8] * (FIELDS // 2 - 1) + [4, DIM])
    return DLRM_Net(size, np.array([rows] * FIELDS), np.array([4, 32, DIM]), np.array([top, 32, 1]), sigmoid_top=1, **options)


def inputs(name: str, rows: int, size: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    lookups = 1 if name == "one_id" else LOOKUPS
    numbers = torch.rand(size, 4, generator=g)
    offsets = [torch.arange(0, size * lookups, lookups) for _ in range(FIELDS)]
    indices = [ids(size * lookups, rows, seed + 10 * k, low=0) for k in range(FIELDS)]
    if name == "stacked":  # as the script's own data loader gives them
        return numbers, torch.stack(offsets), torch.stack(indices)
    if lookups > 1 and not name.startswith("weighted"):  # bags of different sizes, one of them empty
        cut = [torch.sort(torch.randint(0, size * lookups, (size - 1,), generator=g)).values for _ in range(FIELDS)]
        offsets = [torch.cat([torch.zeros(1, dtype=torch.int64), c]) for c in cut]
    return numbers, offsets, indices


MODELS = zoo(make, tuple(TABLE), inputs)
