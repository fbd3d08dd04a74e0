"""The sharded example under torchrun: trains as the plain model does, and goes on from its checkpoint on fewer ranks."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tablewright
from ranks import free_port

SCRIPT = Path(tablewright.__file__).resolve().parent / "examples" / "train_dlrm_sharded.py"


def torchrun(ranks: int, *arguments: str) -> str:
    link = os.pathsep.join(dict.fromkeys([*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(SCRIPT.parents[2])]))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port()), str(SCRIPT),
         "--rows", "4000", "--rows-per-table", "400", "--dim", "4", "--batch-size", "32", "--cpu", *arguments],
        env={**os.environ, "PYTHONPATH": link, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_it_equals_the_plain_model_and_resumes_on_fewer_ranks(tmp_path):
    path = ["--checkpoint", str(tmp_path), "--checkpoint-every", "6"]
    said = torchrun(2, "--sharding", "row_wise", "--exchange", "auto", "--steps", "6", "--check", *path)
    assert "26/26 shards placed" in said and "largest difference of a loss" in said and "row_wise  1" in said
    assert "step     8" in torchrun(1, "--sharding", "table_wise", "--steps", "8", "--resume", *path)
