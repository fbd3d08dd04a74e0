"""Exports for serving: what is written, that it equals the training model, and what a failed export leaves."""
from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import tablewright as tw
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from serving_models import (
    EveryLookup,
    arrays,
    close,
    every_lookup_inputs,
    exported,
    plain,
    stored_rows,
    towers,
    trained,
    two_towers_inputs,
    without_torch,
)
from tablewright.kernels.codecs.op import decode
from tablewright.rewriter.serving import manifest as manifests
from torch import nn


@pytest.mark.parametrize("shards", [1, 3])
def test_every_form_of_lookup_is_served_as_trained(shards):
    model, home = exported(shards)
    p = tw.load_serving(home)
    for batch, seed in ((6, 0), (1, 1), (2, 2), (33, 4)):
        inputs = every_lookup_inputs(batch, seed)
        got, wanted = p(**arrays(inputs)), plain(model, inputs)
        assert set(got) == {"score", "user"} and all(close(got[k], wanted[k]) for k in wanted), batch
    assert p(**arrays(every_lookup_inputs(0)))["score"].shape == (0,)


def test_no_table_and_no_training_part_is_in_a_graph():
    model, home = exported()
    found = manifests.read(home)
    assert not found.raw["left_inside"]
    assert set(found.tables) == {"user", "item", "recent", "best", "weighted", "short", "free"}  # "tags" is tied to "item"
    for name in ("model", "dense", "pre"):
        proto = onnx.load(found.root / f"{name}.onnx")
        onnx.checker.check_model(proto, full_check=True, check_custom_domain=True)
        assert sum(t.dims[0] * (t.dims[1] if len(t.dims) > 1 else 1) for t in proto.graph.initializer if t.dims) < 67 * 16 + 200
        shapes = {tuple(t.dims) for t in proto.graph.initializer}
        assert not shapes & {(t.rows, t.dim) for t in found.tables.values()}
        ops = {n.op_type for n in proto.graph.node}
        assert not ops & {"Dropout", "BatchNormalization"}
        assert ("DistributedGather" in ops) == (name == "model")
        assert {o.domain for o in proto.opset_import} <= ({"", "ai.tablewright"} if name == "model" else {""})
    inputs = [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(found.root / "model.onnx").graph.input]
    assert inputs[0] == ["batch", 3] and inputs[1] == ["batch"]


def test_shapes_are_inferred_without_the_exporters_notes():
    proto = onnx.load(exported()[1] / manifests.current(exported()[1]) / "model.onnx")
    wanted = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.value_info}
    del proto.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    found = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info}
    outs = [n.output[0] for n in proto.graph.node if n.domain == "ai.tablewright"]
    assert len(outs) == 9
    for name in outs:
        assert len(found[name]) == len(wanted[name]) and found[name][-1] == 8


def test_the_reference_evaluator_agrees_with_the_whole_graph():
    """An oracle that shares nothing with the predictor: onnx's own interpreter on model.onnx."""
    model, home = exported()
    manifest = manifests.read(home)
    tables = {name: stored_rows(manifest, name).view("<f4") for name in manifest.tables}

    class DistributedGather(OpRun):
        op_domain = "ai.tablewright"

        def _run(self, ids, table=None, rows=None, dim=None, wrap_negative=None):
            return (tables[table][ids],)

    class DistributedGatherBag(OpRun):
        op_domain = "ai.tablewright"

        def _run(self, ids, offsets=None, weights=None, table=None, rows=None, dim=None, wrap_negative=None, mode=None, padding_idx=None,
                 include_last_offset=None):  # fmt: skip
            pooled = nn.functional.embedding_bag(
                torch.tensor(ids), torch.tensor(tables[table]), None if offsets is None else torch.tensor(offsets), mode=mode,
                per_sample_weights=None if weights is None else torch.tensor(weights), include_last_offset=bool(include_last_offset),
                padding_idx=None if padding_idx < 0 else padding_idx)  # fmt: skip
            return (pooled.numpy(),)

    inputs = every_lookup_inputs(6)
    evaluator = ReferenceEvaluator(onnx.load(home / manifests.current(home) / "model.onnx"), new_ops=[DistributedGather, DistributedGatherBag])
    score, user = evaluator.run(None, arrays(inputs))
    wanted = plain(model, inputs)
    assert close(score, wanted["score"]) and close(user, wanted["user"])


def test_rows_on_disk_are_the_tables():
    model, home = exported(3)
    found = manifests.read(home)
    assert len(found.tables["item"].shards) == 3
    assert np.array_equal(stored_rows(found, "item").view("<f4"), model.item.weight.detach().numpy())


@pytest.mark.parametrize("row_dtype", ["float16", "bfloat16", "int8_rowwise"])
def test_rows_in_fewer_bits_are_those_of_the_codecs(row_dtype, tmp_path):
    model, inputs = exported()[0], every_lookup_inputs(6)
    tw.export_serving(model, (), tmp_path / "m", sample_kwargs=inputs, row_dtype={"user": "float32", "*": row_dtype}, shards=2)
    found, p = manifests.read(tmp_path / "m"), tw.load_serving(tmp_path / "m")
    assert found.tables["user"].row_dtype == "float32" and found.tables["item"].row_dtype == row_dtype
    # the plain model on rows that went through torch's codec is what must be served
    rounded = EveryLookup().eval()
    rounded.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, table in found.tables.items():
            codec = {"float16": "fp16", "bfloat16": "bf16", "int8_rowwise": "int8", "float32": "fp32"}[table.row_dtype]
            weight = rounded.free if name == "free" else getattr(rounded, name).weight
            weight.copy_(decode(torch.from_numpy(stored_rows(found, name)), codec, table.dim, torch.float32))
    got, wanted = p(**arrays(inputs)), plain(rounded, inputs)
    assert close(got["score"], wanted["score"], 2e-3 if row_dtype != "float32" else 1e-6)  # `short` is rounded to half again
    assert close(got["user"], wanted["user"])
    assert 0 < found.raw["parity"]["difference_to_training"] < 0.1


def test_an_optimized_model_is_exported_as_it_is_trained(tmp_path):
    model = trained(EveryLookup()).train()
    inputs = every_lookup_inputs(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opt, optimizer = tw.optimize(model, optimizer=optimizer, sample_inputs=(), sample_kwargs=inputs)
    opt(**inputs)["score"].sum().backward()
    optimizer.step()
    tw.export_serving(opt, (), tmp_path / "m", sample_kwargs=inputs)
    assert opt.training and model.training
    assert not torch.equal(before["item.weight"], model.item.weight)
    assert close(tw.load_serving(tmp_path / "m")(**arrays(inputs))["score"], plain(model.eval(), inputs)["score"])


def test_the_runtime_needs_no_torch():
    model, home = exported()
    inputs = every_lookup_inputs(6)
    np.savez(home.parent / "inputs.npz", **arrays(inputs))
    printed = without_torch(
        f"import numpy as np, tablewright as tw\np = tw.load_serving({str(home)!r})\n"
        f"print(p(**np.load({str(home.parent / 'inputs.npz')!r}))['score'].tolist())"
    )
    assert close(np.array(json.loads(printed), np.float32), plain(model, inputs)["score"])


def test_small_tables_stay_inside_by_plan(tmp_path):
    plan = tw.Plan(serving={"inline_below": 50 * 8 * 4 + 1})
    assert tw.Plan.from_dict(plan.to_dict()) == plan
    inputs = every_lookup_inputs(6)
    model = exported()[0]
    tw.export_serving(model, (), tmp_path / "m", sample_kwargs=inputs, plan=plan)
    found = manifests.read(tmp_path / "m")
    assert set(found.tables) == {"item"} and any("serving.inline_below" in said for said in found.raw["left_inside"])
    assert close(tw.load_serving(tmp_path / "m")(**arrays(inputs))["score"], plain(model, inputs)["score"])
    with pytest.raises(tw.PlanError, match="inline_below"):
        tw.Plan(serving={"inline_bellow": 3})


class Columns(nn.Module):
    """Lookups of the columns of one input, beside each other: stacked, concatenated, and with something in between."""

    def __init__(self, pooled: bool):
        super().__init__()
        self.pooled = pooled
        self.a, self.b = ([(nn.EmbeddingBag(30 + k, 8, mode="sum") if pooled else nn.Embedding(30 + k, 8)) for k in range(n)] for n in (4, 3))
        self.tables = nn.ModuleList([*self.a, *self.b])

    def forward(self, dense, ids):
        rows = [table(ids[:, k : k + 1] if self.pooled else ids[:, k]) for k, table in enumerate(self.tables)]
        stacked = torch.stack([dense, *rows[:4]], 1)
        return torch.cat([rows[4], dense, rows[5], rows[6]], 1), torch.bmm(stacked, stacked.transpose(1, 2))


@pytest.mark.parametrize("pooled, row_dtype, shards", [(True, "float32", 1), (False, "int8_rowwise", 1), (False, "float32", 2)])
def test_rows_side_by_side_are_one_input(pooled, row_dtype, shards, tmp_path):
    model = Columns(pooled).eval()
    tw.export_serving(model, (torch.randn(4, 8), torch.randint(30, (4, 7))), tmp_path / "m", row_dtype=row_dtype, shards=shards, missing={"tables.1": "zeros"})
    p = tw.load_serving(tmp_path / "m")
    joins = p.manifest.raw["joins"]
    assert [(j["lookups"], j["stacked"]) for j in joins] == [([0, 1, 2, 3], True), ([5, 6], False)]
    dense = onnx.load(p.manifest.root / "dense.onnx").graph
    assert [i.name for i in dense.input] == ["dense", "rows.4.tables.4", "rows.join.0", "rows.join.1"]
    assert len(p._version.lookups._blocks) == (2 if shards == 1 else 0)  # tables in one file: one gather each
    for batch in (1, 5, 3):
        x, ids = torch.randn(batch, 8), torch.randint(30, (batch, 7))
        wanted = model(x, ids)
        for got, want in zip(p(dense=x.numpy(), ids=ids.numpy()), wanted):
            assert close(got, want.detach(), 1e-6 if row_dtype == "float32" else 2e-2)
    before = p(dense=x.numpy(), ids=ids.numpy())[1][1:]
    ids[0, 1] = 99  # a zero row, by policy; the other rows of the batch stay as they are
    got = p(dense=x.numpy(), ids=ids.numpy())[1]
    assert p.stats()["missing_ids"]["tables.1"] >= 1 and np.array_equal(got[1:], before) and not got[0, 2, 2:4].any()
    with pytest.raises(tw.IdOutOfRange, match="3 of the 3 ids in column 0 of input 'ids'"):
        p(dense=x.numpy(), ids=np.full((3, 7), 33))


def test_columns_from_the_end_and_too_few_columns(tmp_path):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Embedding(20, 4), nn.Embedding(30, 4), nn.EmbeddingBag(40, 4, mode="sum")

        def forward(self, ids):
            return torch.cat([self.a(ids[:, -1]), self.b(ids[:, 0]), self.c(ids[:, 0:2])], 1)

    model = Last().eval()
    tw.export_serving(model, (torch.randint(20, (4, 2)),), tmp_path / "m")
    p = tw.load_serving(tmp_path / "m")
    ids = torch.randint(20, (5, 2))
    assert close(p(ids=ids.numpy()), model(ids).detach())
    for wrong in (np.full((5, 2), 20), np.full((5, 2), -1)):
        with pytest.raises(tw.IdOutOfRange):
            p(ids=wrong)
    model = Columns(False).eval()
    tw.export_serving(model, (torch.randn(4, 8), torch.randint(30, (4, 7))), tmp_path / "n")
    p = tw.load_serving(tmp_path / "n")
    for width in (1, 6):
        with pytest.raises(tw.InputError, match=f"{width} columns; the model reads 7|must be 7 at least"):
            p(dense=np.zeros((4, 8), np.float32), ids=np.zeros((4, width), int))


# --- shared inputs -----------------------------------------------------------------------------------------------------------


def test_one_user_and_many_candidates():
    model, home = towers()
    p = tw.load_serving(home)
    raw = p.manifest.raw
    assert raw["shared"]["inputs"] == ["user_id", "user_history", "user_dense"] and raw["shared"]["lookups"] == [0, 1]
    once = two_towers_inputs(40, users=1)
    repeated = {k: v.repeat_interleave(40, 0) if k != "item_id" else v for k, v in once.items()}
    wanted = plain(model, repeated)
    assert close(p(**arrays(once)), wanted) and close(p(**arrays(repeated)), wanted)
    shared = onnx.load(p.manifest.root / "shared.onnx")
    assert len(raw["shared"]["cut"]) == 1 and [n.op_type for n in shared.graph.node].count("Gemm") == 2
    assert [n.op_type for n in onnx.load(p.manifest.root / "rest.onnx").graph.node].count("Gemm") == 2
    with pytest.raises(tw.InputError, match="3 rows beside a batch of 40"):
        p(**{**arrays(two_towers_inputs(40, users=3))})


def test_what_mixes_rows_is_not_shared(tmp_path):
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.users, self.items = nn.Embedding(100, 4), nn.Embedding(100, 4)

        def forward(self, user, item):
            rows = self.users(user)
            return rows.sum(0) * rows * self.items(item)

    with pytest.raises(tw.ExportError, match="mixes rows of its batch"):
        tw.export_serving(Mixes(), (torch.arange(5), torch.arange(5)), tmp_path / "m", shared=["user"])
    assert not list((tmp_path / "m").iterdir())


# --- refusals and failed exports ---------------------------------------------------------------------------------------------


def test_a_version_is_never_overwritten_and_current_moves(tmp_path):
    model, home = towers()[0], shutil.copytree(towers()[1], tmp_path / "m")
    one, inputs = manifests.current(home), tuple(two_towers_inputs(5).values())
    with pytest.raises(tw.ExportError, match="a version never changes"):
        tw.export_serving(model, inputs, home, version=one)
    tw.export_serving(model, inputs, home, version="two", activate=False)
    assert manifests.current(home) == one and manifests.read(home / "two").raw["previous"] == one
    assert sorted(p.name for p in home.iterdir()) == sorted(["CURRENT", one, "two"])


def test_an_export_that_fails_leaves_what_was_served(tmp_path, monkeypatch):
    from tablewright.rewriter.serving import export

    model, home = towers()[0], shutil.copytree(towers()[1], tmp_path / "m")
    one = manifests.current(home)
    monkeypatch.setattr(export, "_record", lambda *a: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        tw.export_serving(model, tuple(two_towers_inputs(5).values()), home, version="two")
    assert sorted(p.name for p in home.iterdir()) == sorted(["CURRENT", one]) and manifests.current(home) == one


@pytest.mark.parametrize("options, said", [
    ({"row_dtype": "int8"}, "did you mean 'int8_rowwise'"), ({"row_dtype": {"usr": "float16"}}, "no table matches 'usr'"),
    ({"missing": "zero"}, "must be 'error', 'zeros', 'mean' or"), ({"missing": {"items": "row:200"}}, "an id below 200"),
    ({"shards": 0}, "shards is 0"), ({"shared": ["usr_*"]}, "no input matches"), ({"version": "../x"}, "must be a file name"),
    ({"shared": "user_id"}, "must be a list"),
])  # fmt: skip
def test_wrong_options_are_named(options, said, tmp_path):
    with pytest.raises(tw.ExportError, match=said):
        tw.export_serving(towers()[0], tuple(two_towers_inputs(5).values()), tmp_path / "m", **options)


class _Model(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self._call = forward

    def forward(self, ids):
        return self._call(self, ids)


@pytest.mark.parametrize("model, said", [
    (_Model(lambda m, ids: m.a(ids), a=nn.Embedding(9, 2, max_norm=1.0)), "max_norm|changes a stored tensor"),
    (_Model(lambda m, ids: m.a(ids) + torch.rand(1), a=nn.Embedding(9, 2)), "draws random numbers"),
    (_Model(lambda m, ids: (m.a(ids), 3), a=nn.Embedding(9, 2)), "returns 3 beside tensors"),
])  # fmt: skip
def test_models_that_cannot_be_served_are_refused(model, said, tmp_path):
    with pytest.raises((tw.ExportError, tw.CaptureError), match=said):
        tw.export_serving(model, (torch.arange(4),), tmp_path / "m")


def test_a_batch_of_one_is_refused(tmp_path):
    with pytest.raises(tw.ExportError, match="batch of two or more"):
        tw.export_serving(_Model(lambda m, ids: m.a(ids), a=nn.Embedding(9, 2)), (torch.arange(1),), tmp_path / "m")


def test_ids_that_come_from_rows_keep_their_table_inside(tmp_path):
    model = _Model(lambda m, ids: m.b(m.a(ids).argmax(1)), a=nn.Embedding(9, 4), b=nn.Embedding(4, 3))
    tw.export_serving(model, (torch.arange(9),), tmp_path / "m")
    found = manifests.read(tmp_path / "m")
    assert set(found.tables) == {"a"} and "rows of another lookup" in found.raw["left_inside"][0]
    assert close(tw.load_serving(tmp_path / "m")(ids=np.arange(9)), model(torch.arange(9)).detach())


def test_an_edited_manifest_is_not_trusted(tmp_path):
    home = shutil.copytree(towers()[1], tmp_path / "m")
    path = home / manifests.current(home) / "manifest.json"
    path.write_text(path.read_text().replace('"rows": 200', '"rows": 201'))
    with pytest.raises(tw.CorruptShard, match="does not have the digest"):
        tw.load_serving(home)
    raw = json.loads(path.read_text())
    raw["format"] = 2
    path.write_text(json.dumps(raw))
    with pytest.raises(tw.VersionSkew, match="format 2"):
        tw.load_serving(home)
