"""ONNX functions of `BatchedNmsKeep` and `BatchedNmsCompact`, so that ONNX Runtime can run the AOT flavour."""

from __future__ import annotations

import onnx

from maskrcnn.plugins import contract

_KEEP = """
    <domain: "{domain}", opset_import: ["": {opset}, "{domain}": {version}]>
    BatchedNmsKeep <iou_threshold, max_output> (boxes, groups, counts) => (keep)
    {{
        indices, num = {domain}.BatchedNms
            <iou_threshold: float = @iou_threshold, max_output: int = @max_output> (boxes, groups, counts)
        zero = Constant<value_int = 0>()
        one = Constant<value_int = 1>()
        column = Constant<value_ints = [1]>()
        places = Cast<to = 7>(indices)
        length = Shape<start = 1>(indices)
        m = Squeeze(length)
        ranks = Range(zero, m, one)
        num_long = Cast<to = 7>(num)
        num_column = Unsqueeze(num_long, column)
        is_kept = Less(ranks, num_column)
        marks = Cast<to = 6>(is_kept)
        shape = Shape(groups)
        nothing = ConstantOfShape<value = int32[1] {{0}}>(shape)
        keep = ScatterElements<axis = 1, reduction = "max">(nothing, places, marks)
    }}"""

_COMPACT = """
    <domain: "{domain}", opset_import: ["": {opset}]>
    BatchedNmsCompact <max_output> (keep) => (indices, num)
    {{
        zero = Constant<value_int = 0>()
        one = Constant<value_int = 1>()
        flat_shape = Constant<value_ints = [-1]>()
        column = Constant<value_ints = [1]>()
        length = Shape<start = 1>(keep)
        k = Squeeze(length)
        rows = Range(zero, k, one)
        is_kept = Cast<to = 9>(keep)
        later = Add(rows, k)
        order = Where(is_kept, rows, later)
        limit = Constant<value_int: int = @max_output>()
        m = Min(limit, k)
        m_axis = Reshape(m, flat_shape)
        first, places = TopK<axis = 1, largest = 0, sorted = 1>(order, m_axis)
        is_live = Less(first, k)
        chosen = Where(is_live, first, zero)
        missing = Sub(limit, m)
        missing_axis = Reshape(missing, flat_shape)
        no_pad = Constant<value_ints = [0, 0, 0]>()
        pads = Concat<axis = 0>(no_pad, missing_axis)
        padded = Pad(chosen, pads)
        indices = Cast<to = 6>(padded)
        live = Cast<to = 7>(is_live)
        count = ReduceSum<keepdims = 0>(live, column)
        num = Cast<to = 6>(count)
    }}"""


def functions(opset: int) -> list[onnx.FunctionProto]:
    """Returns both functions; the first calls `BatchedNms`, whose function the model must have too."""
    names = {"domain": contract.DOMAIN, "version": contract.VERSION, "opset": opset}
    return [onnx.parser.parse_function(text.format(**names)) for text in (_KEEP, _COMPACT)]
