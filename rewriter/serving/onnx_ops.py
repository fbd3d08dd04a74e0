"""The ops of the ONNX domain "ai.tablewright", and how an exporter writes ``tablewright::distributed_gather`` as them.

* ``DistributedGather(ids)`` -> float rows ``[*ids, dim]``. Attributes: table, rows, dim, wrap_negative.
* ``DistributedGatherBag(ids, offsets?, per_sample_weights?)`` -> float rows ``[bags, dim]``. Attributes: those, and mode, padding_idx
  (-1: none), include_last_offset. The meaning is that of ``kernels/gather/op.py``.
"""
from __future__ import annotations

import functools

import onnx
from onnx import defs
from onnxscript import values

from ...kernels.gather.op import BAG, GATHER

DOMAIN, VERSION = "ai.tablewright", 1
OPSET = 18
_TYPE = defs.OpSchema.AttrType
_OPTIONAL = defs.OpSchema.FormalParameterOption.Optional
_IDS = [("T", ["tensor(int64)", "tensor(int32)"], "ids")]
_COMMON = [("table", _TYPE.STRING), ("rows", _TYPE.INT), ("dim", _TYPE.INT), ("wrap_negative", _TYPE.INT)]
_BAG = [("mode", _TYPE.STRING), ("padding_idx", _TYPE.INT), ("include_last_offset", _TYPE.INT)]


@functools.cache
def register() -> None:
    """Make the ops known to ``onnx`` (its checker and its shape inference), once a process."""
    gather = defs.OpSchema(
        "DistributedGather", DOMAIN, VERSION, "Rows by id from a named table that is not in the graph.",
        inputs=[defs.OpSchema.FormalParameter("ids", "T")], outputs=[defs.OpSchema.FormalParameter("rows", "tensor(float)")],
        type_constraints=_IDS, attributes=[defs.OpSchema.Attribute(n, t, n, required=True) for n, t in _COMMON],
    )  # fmt: skip
    bag = defs.OpSchema(
        "DistributedGatherBag", DOMAIN, VERSION, "Pooled rows by bags of ids from a named table that is not in the graph.",
        inputs=[
            defs.OpSchema.FormalParameter("ids", "T"), defs.OpSchema.FormalParameter("offsets", "T", param_option=_OPTIONAL),
            defs.OpSchema.FormalParameter("per_sample_weights", "tensor(float)", param_option=_OPTIONAL),
        ],
        outputs=[defs.OpSchema.FormalParameter("rows", "tensor(float)")], type_constraints=_IDS,
        attributes=[defs.OpSchema.Attribute(n, t, n, required=True) for n, t in (*_COMMON, *_BAG)],
    )  # fmt: skip
    gather.set_type_and_shape_inference_function(lambda context: _infer(context, bag=False))
    bag.set_type_and_shape_inference_function(lambda context: _infer(context, bag=True))
    for schema in (gather, bag):
        defs.register_schema(schema)


def _infer(context, bag: bool) -> None:
    ids, out = context.get_input_type(0), onnx.TypeProto()
    out.tensor_type.elem_type = onnx.TensorProto.FLOAT
    shape = out.tensor_type.shape
    if bag:
        offsets = context.get_input_type(1) if context.get_num_inputs() > 1 else None
        lead = offsets if offsets is not None and offsets.HasField("tensor_type") else ids
        bags = shape.dim.add()
        if lead is ids and ids.tensor_type.HasField("shape") and len(ids.tensor_type.shape.dim):
            bags.CopyFrom(ids.tensor_type.shape.dim[0])
        elif lead is not ids and lead.tensor_type.HasField("shape") and not context.get_attribute("include_last_offset").i:
            bags.CopyFrom(lead.tensor_type.shape.dim[0])
    elif ids.tensor_type.HasField("shape"):
        shape.CopyFrom(ids.tensor_type.shape)
    else:
        context.set_output_type(0, out)
        return
    shape.dim.add().dim_value = context.get_attribute("dim").i
    context.set_output_type(0, out)


def translations() -> dict:
    """For ``torch.onnx.export(custom_translation_table=...)``."""
    register()
    opset = values.Opset(DOMAIN, VERSION)

    def gather(ids, table: str, rows: int, dim: int, wrap_negative: bool = False):
        return opset.DistributedGather(ids, table=table, rows=rows, dim=dim, wrap_negative=int(wrap_negative))

    def bag(ids, offsets, per_sample_weights, table: str, rows: int, dim: int, mode: str, padding_idx: int = -1,
            include_last_offset: bool = False, wrap_negative: bool = False):  # fmt: skip
        return opset.DistributedGatherBag(
            ids, offsets, per_sample_weights, table=table, rows=rows, dim=dim, mode=mode, padding_idx=padding_idx,
            include_last_offset=int(include_last_offset), wrap_negative=int(wrap_negative),
        )  # fmt: skip

    return {GATHER: gather, BAG: bag}
