"""Exports from several processes, each of which writes its own rows, and from tables in tiers and in fewer bits.

Here each world has all ways of sharding in one model; each way alone, in every row format, by hand:
``python tests/rewriter/test_serving_sharded.py`` (minutes).
"""
from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

import pytest
import tablewright as tw
import torch
from tablewright.rewriter.serving import manifest as manifests

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

from ranks import Pools
from serving_ranks import SHARDINGS, export_both, export_fails, files_of
from small_models import Dot, dot_batch
from tier_training import batch, model_in, train


@pytest.fixture(scope="module")
def pools():
    made = Pools(timeout=300)
    yield made
    made.close()


@pytest.mark.parametrize("world, row_dtype, delta", [(1, "float32", False), (2, {"user": "float16", "*": "int8_rowwise"}, True), (3, "float32", False),
                                                     (4, {"wide": "float32", "*": "int8_rowwise"}, False)])  # fmt: skip
def test_ranks_write_what_one_process_would(pools, world, row_dtype, delta, tmp_path):
    pools(world).run(export_both, str(tmp_path), "mixed", row_dtype, delta)


@pytest.mark.parametrize("how, first, last", [
    ("last", "ExportError: rank 1 of 2 could not do its part of the export ('write'): OSError: no space", "ExportError: rank 1 of 2"),
    ("first", "ExportError: rank 0 of 2 could not do its part of the export ('write'): OSError: no space", "ExportError: rank 0 of 2"),
    ("sample", "PlainModelFails: the plain model fails on the sample", "PlainModelFails: the plain model fails on the sample"),
    ("dies", "PeerError: rank 0 of 2: an export for serving did not complete", ""),
])  # fmt: skip
def test_a_rank_that_fails_ends_the_export_everywhere(pools, how, first, last, tmp_path):
    outcomes = pools(2).outcomes(export_fails, str(tmp_path), how, heard=1 if how == "dies" else None)
    for (ok, said), wanted in zip(outcomes, (first, last)):
        assert ok and said.startswith(wanted), said
    assert not list((tmp_path / how).glob("*")) and not list((tmp_path / how).glob(".*"))  # nothing is published, and nothing is left


def test_tables_in_tiers_are_read_from_their_store(tmp_path):
    opt, optimizer = model_in(tmp_path)
    train(opt, optimizer, 0, 3)
    counters = opt.tiers["item.weight"]
    assert counters.present < 1000
    plain = opt.unoptimized().eval()
    for model, where in ((opt.eval(), "tiers"), (plain, "memory")):
        tw.export_serving(model, batch(5)[:2], tmp_path / where / "m", version="one", row_dtype={"item": "float16"})
    train(opt.train(), optimizer, 3, 4)
    plain = opt.unoptimized().eval()
    for model, where in ((opt.eval(), "tiers"), (plain, "memory")):
        tw.export_delta(model, batch(5)[:2], tmp_path / where / "m", version="two")
    assert opt.tiers["item.weight"].present == counters.present or opt.tiers["item.weight"].batches == 0
    assert files_of(tmp_path / "tiers") == files_of(tmp_path / "memory")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_tables_stored_in_fewer_bits_are_served_as_they_are(dtype, tmp_path):
    opt = tw.optimize(Dot(), tw.Plan(tables={"user": {"dtype": dtype}}, embedding_optimizer=tw.RowwiseAdagrad(lr=0.1, in_backward=True)), sample_inputs=dot_batch()).eval()
    names = {"bf16": "bfloat16", "fp16": "float16"}
    tw.export_serving(opt, dot_batch(), tmp_path / "m", row_dtype={"user": names[dtype], "*": "float32"})
    found, user = manifests.read(tmp_path / "m"), opt.get_parameter("user.weight").detach()
    assert user.dtype == getattr(torch, names[dtype]) and found.tables["user"].row_dtype == names[dtype]
    shard = found.tables["user"].shards[0]
    raw = (found.root / shard.file).read_bytes()[shard.offset : shard.offset + shard.bytes]
    assert raw == user.contiguous().view(torch.uint8).numpy().tobytes()
    p, (args, wanted) = tw.load_serving(tmp_path / "m"), (dot_batch(7), opt(*dot_batch(7)).detach())
    got = p(**{d["name"]: t.numpy() for d, t in zip(found.raw["inputs"], args)})
    torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=1e-6, atol=1e-6)


def main() -> None:
    made, wrong = Pools(), []
    for sharding, world, row_dtype in itertools.product(dict.fromkeys([*SHARDINGS.values(), "mixed"]), (1, 2, 3, 4), ("float32", "bfloat16", "int8_rowwise")):
        with tempfile.TemporaryDirectory() as folder:
            try:
                made(world).run(export_both, folder, sharding, row_dtype)
            except AssertionError as error:
                wrong.append((sharding, world, row_dtype))
                print(wrong[-1], str(error)[-1500:], flush=True)
    made.close()
    print(f"{len(wrong)} wrong: {wrong}")


if __name__ == "__main__":
    main()
