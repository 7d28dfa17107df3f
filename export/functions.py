"""ONNX functions of the custom ops: bodies of standard operators, so that any runtime can run the file.

TensorRT runs `maskrcnn::MultilevelRoiAlign` and `maskrcnn::BatchedNms` with the plugins; every other runtime inlines
these bodies. A body may use data-dependent operators, the main graph may not.
"""

from __future__ import annotations

import onnx

from maskrcnn.plugins import contract

# Names of the two pixel models in ONNX; aligned=False is torchvision's default.
_COORDINATES = {False: "output_half_pixel", True: "half_pixel"}


def multilevel_roi_align(num_levels: int, *, aligned: bool, min_level: int, opset: int) -> onnx.FunctionProto:
    """Returns the function of `MultilevelRoiAlign`, which pools each RoI at its own level only.

    A function body cannot depend on the number of inputs or derive a mode's name from an integer, so these attributes
    are fixed per function.

    Args:
        num_levels: number of pyramid levels.
        aligned: pixel centres at half-integers.
        min_level: exponent of the first level's stride.
        opset: ONNX opset version of the body.
    """
    pool = "".join(
        f"""
        pooled_{i} = RoiAlign<coordinate_transformation_mode = "{_COORDINATES[aligned]}", mode = "avg",
            output_height: int = @output_size, output_width: int = @output_size,
            sampling_ratio: int = @sampling_ratio, spatial_scale = {0.5 ** (min_level + i)}>
            (features_{i}, boxes_{i}, image_{i})"""
        for i in range(num_levels)
    )
    return _pooling(contract.MULTILEVEL_ROI_ALIGN, pool, num_levels, min_level=min_level, opset=opset)


def multilevel_roi_pool(num_levels: int, *, min_level: int, opset: int) -> onnx.FunctionProto:
    """Returns the function of `MultilevelRoiPool`, on the standard MaxRoiPool; arguments as for `multilevel_roi_align`.

    RoIs are rounded to integer pixels, halves away from zero, before MaxRoiPool does the same: integers are exact even
    if a runtime computes in bfloat16.
    """
    pool = "".join(
        f"""
        scale_{i} = Constant<value_float = {0.5 ** (min_level + i)}>()
        scaled_{i} = Mul(boxes_{i}, scale_{i})
        sign_{i} = Sign(scaled_{i})
        distance_{i} = Abs(scaled_{i})
        below_{i} = Floor(distance_{i})
        rest_{i} = Sub(distance_{i}, below_{i})
        is_up_{i} = GreaterOrEqual(rest_{i}, half)
        up_{i} = Cast<to = 1>(is_up_{i})
        rounded_{i} = Add(below_{i}, up_{i})
        corners_{i} = Mul(sign_{i}, rounded_{i})
        image_float_{i} = Cast<to = 1>(image_{i})
        image_column_{i} = Unsqueeze(image_float_{i}, one_axis)
        rois_{i} = Concat<axis = 1>(image_column_{i}, corners_{i})
        pooled_{i} = MaxRoiPool<pooled_shape: ints = @pooled_shape, spatial_scale = 1.0>(features_{i}, rois_{i})"""
        for i in range(num_levels)
    )
    pool = "half = Constant<value_float = 0.5>()" + pool
    return _pooling(contract.MULTILEVEL_ROI_POOL, pool, num_levels, min_level=min_level, opset=opset)


def _pooling(op: contract.Op, pool: str, num_levels: int, *, min_level: int, opset: int) -> onnx.FunctionProto:
    """A function that groups the RoIs by level, pools each group and restores the order.

    Args:
        op: op of the contract, whose attributes the function has.
        pool: body that computes `pooled_i` from `features_i`, `boxes_i` `[K_i, 4]` and `image_i` `[K_i]` per level i.
        num_levels, min_level, opset: as for `multilevel_roi_align`.
    """
    levels = range(num_levels)
    names = [f"p{i}" for i in levels]
    sort = "".join(
        f"""
        number_{i} = Constant<value_float = {float(i)}>()
        here_{i} = Equal(level, number_{i})
        found_{i} = NonZero(here_{i})
        rows_{i} = Squeeze(found_{i}, zero_axis)
        boxes_{i} = Gather(flat, rows_{i})
        image_{i} = Gather(image, rows_{i})
        features_{i} = Cast<to = 1>(p{i})"""
        for i in levels
    )
    text = f"""
    <domain: "{contract.DOMAIN}", opset_import: ["": {opset}]>
    {op.name} <{", ".join(op.attributes)}> ({", ".join(names)}, rois) => (pooled)
    {{
        canonical_level_int = Constant<value_int: int = @canonical_level>()
        canonical_level = Cast<to = 1>(canonical_level_int)
        canonical_size = Constant<value_float: float = @canonical_size>()
        epsilon = Constant<value_float: float = @level_epsilon>()
        zero = Constant<value_float = 0.0>()
        highest = Constant<value_float = {float(num_levels - 1)}>()
        first = Constant<value_float = {float(min_level)}>()
        two = Constant<value_float = 2.0>()
        zero_axis = Constant<value_ints = [0]>()
        box_shape = Constant<value_ints = [-1, 4]>()
        flat_shape = Constant<value_ints = [-1]>()
        flat = Reshape(rois, box_shape)
        x1, y1, x2, y2 = Split<axis = 1, num_outputs = 4>(flat)
        width = Sub(x2, x1)
        height = Sub(y2, y1)
        area_column = Mul(width, height)
        area = Reshape(area_column, flat_shape)
        size = Sqrt(area)
        relative = Div(size, canonical_size)
        logarithm = Log(relative)
        log_of_two = Log(two)
        octaves = Div(logarithm, log_of_two)
        octaves_up = Add(octaves, canonical_level)
        octaves_up_epsilon = Add(octaves_up, epsilon)
        exponent = Floor(octaves_up_epsilon)
        level_any = Sub(exponent, first)
        level_inside = Clip(level_any, zero, highest)
        # A box with no area or with NaN is assigned to the first level, so that every box has a level.
        has_area = Greater(area, zero)
        level = Where(has_area, level_inside, zero)

        rois_shape = Shape(rois)
        n = Gather<axis = 0>(rois_shape, zero_axis)
        one_axis = Constant<value_ints = [1]>()
        r = Gather<axis = 0>(rois_shape, one_axis)
        zero_scalar = Constant<value_int = 0>()
        one_scalar = Constant<value_int = 1>()
        n_scalar = Squeeze(n)
        images = Range(zero_scalar, n_scalar, one_scalar)
        image_column = Unsqueeze(images, one_axis)
        n_by_r = Concat<axis = 0>(n, r)
        image_grid = Expand(image_column, n_by_r)
        image = Reshape(image_grid, flat_shape)
        {sort}
        {pool}
        by_level = Concat<axis = 0>({", ".join(f"pooled_{i}" for i in levels)})
        order = Concat<axis = 0>({", ".join(f"rows_{i}" for i in levels)})
        order_shape = Shape(order)
        total = Squeeze(order_shape)
        positions = Range(zero_scalar, total, one_scalar)
        place = ScatterElements<axis = 0>(order, order, positions)
        in_order = Gather<axis = 0>(by_level, place)
        pooled_shape_of_one = Shape<start = 1>(in_order)
        full_shape = Concat<axis = 0>(n, r, pooled_shape_of_one)
        pooled_float = Reshape(in_order, full_shape)
        pooled = CastLike(pooled_float, p0)
    }}"""
    return onnx.parser.parse_function(text)


def batched_nms(opset: int) -> onnx.FunctionProto:
    """Returns the function of `BatchedNms`, on the standard NonMaxSuppression with one class per group.

    Scores are the negative row indices, which preserves the order of the rows and ties.
    """
    op = contract.BATCHED_NMS
    text = f"""
    <domain: "{contract.DOMAIN}", opset_import: ["": {opset}]>
    {op.name} <{", ".join(op.attributes)}> (boxes, groups, counts) => (indices, num)
    {{
        zero = Constant<value_int = 0>()
        one = Constant<value_int = 1>()
        zero_axis = Constant<value_ints = [0]>()
        one_axis = Constant<value_ints = [1]>()
        two_axis = Constant<value_ints = [2]>()
        flat_shape = Constant<value_ints = [-1]>()
        threshold = Constant<value_float: float = @iou_threshold>()
        iou_threshold = Reshape(threshold, flat_shape)
        max_output = Constant<value_int: int = @max_output>()
        groups_shape = Shape(groups)
        k_axis = Gather<axis = 0>(groups_shape, one_axis)
        k = Squeeze(k_axis)
        rows = Range(zero, k, one)
        row_line = Unsqueeze(rows, zero_axis)
        counts_long = Cast<to = 7>(counts)
        count_column = Unsqueeze(counts_long, one_axis)
        live = Less(row_line, count_column)

        groups_long = Cast<to = 7>(groups)
        highest_group = ReduceMax<keepdims = 0>(groups_long)
        num_groups = Add(highest_group, one)
        all_groups = Range(zero, num_groups, one)
        group_column = Unsqueeze(all_groups, one_axis)
        groups_wide = Unsqueeze(groups_long, one_axis)
        own_group = Equal(groups_wide, group_column)
        live_wide = Unsqueeze(live, one_axis)
        member = And(own_group, live_wide)
        row_float = Cast<to = 1>(rows)
        order_score = Neg(row_float)
        never = Constant<value_float = -1.0e9>()
        limit = Constant<value_floats = [-1.0e8]>()
        nms_scores = Where(member, order_score, never)
        selected = NonMaxSuppression(boxes, nms_scores, k_axis, iou_threshold, limit)

        ends = Constant<value_ints = [0, 2]>()
        kept_places = Gather<axis = 1>(selected, ends)
        nothing = ConstantOfShape<value = int64[1] {{0}}>(groups_shape)
        kept_count_shape = Shape<start = 0, end = 1>(kept_places)
        ones = ConstantOfShape<value = int64[1] {{1}}>(kept_count_shape)
        kept = ScatterND(nothing, kept_places, ones)
        kept_bool = Cast<to = 9>(kept)
        # Kept rows rank by their index, the others past the end; the M smallest ranks are the result.
        row_past = Add(rows, k)
        rank = Where(kept_bool, rows, row_past)
        m = Min(max_output, k)
        m_axis = Reshape(m, flat_shape)
        first_ranks, first_rows = TopK<axis = 1, largest = 0, sorted = 1>(rank, m_axis)
        is_kept = Less(first_ranks, k)
        chosen = Where(is_kept, first_ranks, zero)
        missing = Sub(max_output, m)
        missing_axis = Reshape(missing, flat_shape)
        no_pad = Constant<value_ints = [0, 0, 0]>()
        pads = Concat<axis = 0>(no_pad, missing_axis)
        padded = Pad(chosen, pads)
        indices = Cast<to = 6>(padded)
        kept_number = Cast<to = 7>(is_kept)
        num_long = ReduceSum<keepdims = 0>(kept_number, one_axis)
        num = Cast<to = 6>(num_long)
    }}"""
    return onnx.parser.parse_function(text)


def live_rows(opset: int) -> onnx.FunctionProto:
    """Returns the function of `LiveRows`, which removes rows without a detection in any image."""
    op = contract.LIVE_ROWS
    text = f"""
    <domain: "{contract.DOMAIN}", opset_import: ["": {opset}]>
    {op.name} (boxes, labels, counts) => (live_boxes, live_labels)
    {{
        one = Constant<value_int = 1>()
        flat_shape = Constant<value_ints = [-1]>()
        start = Constant<value_ints = [0]>()
        row_axis = Constant<value_ints = [1]>()
        counts_long = Cast<to = 7>(counts)
        max_count = ReduceMax<keepdims = 0>(counts_long)
        num_rows = Max(max_count, one)
        end = Reshape(num_rows, flat_shape)
        live_boxes = Slice(boxes, start, end, row_axis)
        live_labels = Slice(labels, start, end, row_axis)
    }}"""
    return onnx.parser.parse_function(text)
