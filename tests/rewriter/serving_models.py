"""Small models for the serving tests, each exported once a session, and a process in which torch cannot be imported."""
from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tablewright as tw
import torch
import torch.nn.functional as F
import torch.onnx._internal.exporter._registration
from torch import nn

# PyTorch's exporter builds its library of translations anew at each export, which takes a quarter of it
_apis = torch.onnx._internal.exporter._registration.onnxscript_apis
_apis.get_torchlib_ops = functools.cache(_apis.get_torchlib_ops)

ROOT = Path(tw.__file__).resolve().parent
BLOCKED = "import sys\nfor name in ('torch', 'onnx', 'onnxscript', 'triton'): sys.modules[name] = None\n"


class EveryLookup(nn.Module):
    """Every form of lookup: single, padded history, jagged bags of each mode, weights, hashed ids, a tied table, a half one."""

    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(50, 8, padding_idx=0), nn.Embedding(61, 8)
        self.tags = nn.EmbeddingBag(61, 8, mode="mean", padding_idx=2)
        self.tags.weight = self.item.weight
        self.recent, self.best = nn.EmbeddingBag(40, 8, mode="sum", include_last_offset=True), nn.EmbeddingBag(40, 8, mode="max", padding_idx=1)
        self.weighted, self.short = nn.EmbeddingBag(33, 8, mode="sum"), nn.Embedding(30, 8).half()
        self.free = nn.Parameter(torch.randn(20, 8))
        self.first, self.norm, self.drop, self.last = nn.Linear(67, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 1)

    def forward(self, dense, user, item, history, values, offsets, ends, weights):
        mask = (history > 0).float()
        pooled = (self.user(history) * mask[:, :, None]).sum(1)
        parts = [
            dense, self.user(user), pooled, self.item(item), self.tags(values, offsets), self.recent(values % 40, ends),
            self.best(history % 40), self.weighted(history % 33, per_sample_weights=weights),
            self.short(item % 30).float() + self.free[user % 20 - 20],
        ]  # fmt: skip
        return {"score": self.last(self.drop(F.relu(self.norm(self.first(torch.cat(parts, 1)))))).squeeze(1), "user": pooled}


class TwoTowers(nn.Module):
    """A user part that does not see the items, and a scorer over both."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(100, 16), nn.Embedding(200, 16)
        self.tower = nn.Sequential(nn.Linear(16 + 4, 32), nn.ReLU(), nn.Linear(32, 16))
        self.score = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, user_id, user_history, user_dense, item_id):
        seen = self.items(user_history).mean(1)
        user = self.tower(torch.cat([self.users(user_id) + seen, user_dense], 1))
        return self.score(torch.cat([user, self.items(item_id)], 1)).squeeze(1)


def every_lookup_inputs(batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Duplicates, the largest ids, padding, an empty bag."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 4, batch)
    if batch > 1:
        sizes[1] = 0
    ends = np.concatenate([[0], np.cumsum(sizes)])
    ids = lambda rows, *shape: torch.from_numpy(np.where(rng.random(shape) < 0.2, rows - 1, rng.integers(0, rows, shape)))  # noqa: E731
    return {
        "dense": torch.from_numpy(rng.standard_normal((batch, 3), dtype=np.float32)), "user": ids(50, batch), "item": ids(61, batch),
        "history": ids(50, batch, 5 + seed % 3), "values": ids(61, int(ends[-1])), "offsets": torch.from_numpy(ends[:-1].copy()),
        "ends": torch.from_numpy(ends), "weights": torch.from_numpy(rng.standard_normal((batch, 5 + seed % 3), dtype=np.float32)),
    }  # fmt: skip


def two_towers_inputs(batch: int, users: int | None = None) -> dict[str, torch.Tensor]:
    users = batch if users is None else users
    return {"user_id": torch.randint(100, (users,)), "user_history": torch.randint(200, (users, 6)), "user_dense": torch.randn(users, 4),
            "item_id": torch.randint(200, (batch,))}  # fmt: skip


def trained(model: nn.Module) -> nn.Module:
    """Batch norms with statistics of their own, in evaluation mode."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    return model.eval()


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def plain(model: nn.Module, inputs: dict[str, torch.Tensor]):
    with torch.no_grad():
        return model(**inputs)


def close(got, wanted, bound: float = 1e-6) -> bool:
    """Within ``bound`` of the largest output."""
    wanted = wanted.numpy()
    return got.shape == wanted.shape and float(np.abs(got - wanted).max(initial=0)) <= bound * max(1, np.abs(wanted).max(initial=0))


@functools.cache
def exported(shards: int = 1) -> tuple[nn.Module, Path]:
    """``EveryLookup`` and its model directory. Tests that write to it copy it first."""
    torch.manual_seed(0)
    model = trained(EveryLookup())
    home = Path(tempfile.mkdtemp(prefix="tablewright-serving-")) / "every"
    samples = [((), every_lookup_inputs(6, 0))]
    tw.export_serving(model, (), home, sample_kwargs=samples[0][1], shards=shards)
    return model, home


@functools.cache
def towers(**options) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = TwoTowers().eval()
    home = Path(tempfile.mkdtemp(prefix="tablewright-serving-")) / "towers"
    tw.export_serving(model, tuple(two_towers_inputs(5).values()), home, shared=("user_*",), **options)
    return model, home


def stored_rows(manifest, name: str) -> np.ndarray:
    """All stored rows of a table, read from its files as the manifest says: uint8 ``[rows, row_bytes]``."""
    table = manifest.tables[name]
    parts = [np.fromfile(manifest.root / s.file, "u1", s.bytes, offset=s.offset) for s in table.shards]
    return np.concatenate(parts).reshape(table.rows, table.row_bytes)


def without_torch(code: str, *, timeout: float = 60) -> str:
    """Run ``code`` where torch, onnx and onnxscript cannot be imported; its last line of output."""
    done = subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, timeout=timeout, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]
