"""The contract's ops as ONNX schemas, so that the exporter can write them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx
from onnx.defs import OpSchema

from maskrcnn.plugins import contract

_ATTRIBUTE_TYPES = {
    int: OpSchema.AttrType.INT,
    float: OpSchema.AttrType.FLOAT,
    list: OpSchema.AttrType.INTS,
}
_FEATURE_TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_TYPES = {"float": "F", "float32": "tensor(float)", "int32": "tensor(int32)", "int64": "tensor(int64)"}


def _parameter(tensor: contract.Tensor) -> OpSchema.FormalParameter:
    option = OpSchema.FormalParameterOption.Variadic if tensor.variadic else OpSchema.FormalParameterOption.Single
    shape = ", ".join(map(str, tensor.shape))
    return OpSchema.FormalParameter(tensor.name, _TYPES[tensor.dtype], description=f"[{shape}]", param_option=option)


def schema(op: contract.Op) -> OpSchema:
    """The ONNX schema of one op of the contract.

    ONNX allows a variadic input in the last place only, so `P…, rois` is declared as one variadic input.
    """
    inputs = [_parameter(tensor) for tensor in op.inputs]
    if any(tensor.variadic for tensor in op.inputs[:-1]):
        inputs = [
            OpSchema.FormalParameter(
                "P_and_rois",
                "T",
                description="the levels, then rois",
                param_option=OpSchema.FormalParameterOption.Variadic,
                is_homogeneous=False,
            )
        ]
    variables = [("F", _FEATURE_TYPES, "type of features")]
    if inputs[0].type_str == "T":
        variables.append(("T", _FEATURE_TYPES, "features or rois"))
    used = {p.type_str for p in inputs} | {_TYPES[t.dtype] for t in op.outputs}
    return OpSchema(
        op.name,
        contract.DOMAIN,
        contract.VERSION,
        doc=op.doc,
        inputs=inputs,
        outputs=[_parameter(tensor) for tensor in op.outputs],
        type_constraints=[v for v in variables if v[0] in used],
        attributes=[
            OpSchema.Attribute(name, _ATTRIBUTE_TYPES[kind], required=True) for name, kind in op.attributes.items()
        ],
    )


@contextmanager
def registered() -> Iterator[None]:
    """The ops are known to `onnx` inside this context.

    Not for longer: a schema cannot say what type comes out, whereas a file's own functions can, and shape
    inference prefers the schema.
    """
    new = [op for op in contract.OPS.values() if not onnx.defs.has(op.name, domain=contract.DOMAIN)]
    for op in new:
        onnx.defs.register_schema(schema(op))
    try:
        yield
    finally:
        for op in new:
            onnx.defs.deregister_schema(op.name, contract.VERSION, contract.DOMAIN)
