"""libmaskrcnn_plugins.so: the interface of its plugins and their results.

The library is compiled from its sources with kernels for the CPU. A C++ program calls the methods like a builder and an
engine; test_plugin_registry.py uses TensorRT's real registry.
"""

import inspect
import itertools

import numpy as np
import plugin_library
import pytest
from kernels_on_cpu import BFLOAT16, bfloat16, channels_last, check_guards, guarded, single

from maskrcnn.plugins import contract, native, reference

ROI_ALIGN, NMS = contract.MULTILEVEL_ROI_ALIGN.name, contract.BATCHED_NMS.name
ROI = {"output_size": 3, "sampling_ratio": 2, "aligned": 1, "min_level": 2, "canonical_level": 4}
ROI |= {"canonical_size": 40.0, "level_epsilon": 1e-6}
SUPPRESS = {"iou_threshold": 0.5, "max_output": 8}
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": BFLOAT16}


def rounded(values, kind):
    """Values in one of the three feature types."""
    return bfloat16(values) if kind == "bfloat16" else values.astype(TYPES[kind])


# Creators and attributes


def test_optional_attributes_have_the_defaults_of_the_reference(library):
    signature = inspect.signature(reference.multilevel_roi_align)
    without = {name: p.default for name, p in signature.parameters.items() if p.default is not p.empty}
    required = {name: ROI[name] for name in contract.MULTILEVEL_ROI_ALIGN.attributes if name not in without}
    stored = library.create(ROI_ALIGN, required).serialized()
    assert list(stored) == list(contract.MULTILEVEL_ROI_ALIGN.attributes)
    assert {name: stored[name] for name in without} == {n: type(stored[n])(value) for n, value in without.items()}
    for name in required:
        assert library.create(ROI_ALIGN, {n: v for n, v in required.items() if n != name}) is None
    assert all(library.create(NMS, {name: value}) is None for name, value in SUPPRESS.items())


@pytest.mark.parametrize(
    ("op", "attributes", "found", "expected"),
    [
        (ROI_ALIGN, {"output_size": 0}, "output_size = 0", "1 to 32767"),
        (ROI_ALIGN, {"sampling_ratio": -1}, "sampling_ratio = -1", "0 to 32767"),
        (ROI_ALIGN, {"aligned": 2}, "aligned = 2", "0 to 1"),
        (ROI_ALIGN, {"canonical_size": float("nan")}, "canonical_size = nan", "to 1e+09"),
        (ROI_ALIGN, {"canonical_size": 0.0}, "canonical_size = 0", "to 1e+09"),
        (ROI_ALIGN, {"output_size": np.int64(2**40)}, "output_size = 1.09951163e+12", "1 to 32767"),
        (ROI_ALIGN, {"output_size": 7.0}, "output_size of plugin field type 1", "one integer of 32 or 64 bits"),
        (ROI_ALIGN, {"canonical_size": 224}, "canonical_size of plugin field type 5", "one number of 32 or 64"),
        (ROI_ALIGN, {"output_size": np.int32([7, 7])}, "output_size with 2 values", "one integer"),
        (ROI_ALIGN, {"output_size": ("char", np.frombuffer(b"7", np.uint8))}, "plugin field type 6", "one integer"),
        (ROI_ALIGN, {"spatial_scale": 0.25}, "an attribute spatial_scale", "contract.py"),
        (NMS, {"iou_threshold": 1.5}, "iou_threshold = 1.5", "0 to 1"),
        (NMS, {"max_output": 0}, "max_output = 0", "1 to 2.14748365e+09"),
    ],
)
def test_an_invalid_attribute_is_an_error(library, capfd, op, attributes, found, expected):
    assert library.create(op, (ROI if op == ROI_ALIGN else SUPPRESS) | attributes) is None
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == f"maskrcnn::{op}" and lines[1].startswith("found: ") and found in lines[1]
    assert expected in lines[2] and lines[3].startswith("fix: ")


def test_integers_and_floats_of_64_bits_are_accepted(library):
    wide = {
        n: np.int64(v) if contract.MULTILEVEL_ROI_ALIGN.attributes[n] is int else np.float64(v) for n, v in ROI.items()
    }
    assert library.create(ROI_ALIGN, wide).serialized() == library.create(ROI_ALIGN, ROI).serialized()


def test_a_clone_stores_its_own_values(library):
    plugin = library.create(ROI_ALIGN, ROI)
    before = plugin.serialized_addresses()
    assert len(before) == len(ROI) and not before & plugin.clone().serialized_addresses()


@pytest.mark.parametrize(("op", "attributes"), [(ROI_ALIGN, ROI), (NMS, SUPPRESS)])
def test_a_serialized_plugin_is_restored(library, op, attributes):
    plugin = library.create(op, attributes)
    stored = plugin.serialized()
    assert list(stored) == list(contract.OPS[op].attributes)
    assert stored == {name: type(stored[name])(value) for name, value in attributes.items()}
    for other in (library.create(op, stored, at_runtime=True), plugin.clone(), plugin.attach(), plugin.clone().clone()):
        assert other.serialized() == stored and other.timing_id == plugin.timing_id
        assert other.identity == plugin.identity


def test_the_timing_id_depends_on_each_attribute(library):
    for op, attributes in ((ROI_ALIGN, ROI), (NMS, SUPPRESS)):
        others = {name: value / 2 if isinstance(value, float) else value + 1 for name, value in attributes.items()}
        others |= {"aligned": 0} if "aligned" in attributes else {}
        changed = [attributes | {name: other} for name, other in others.items()]
        ids = {library.create(op, some).timing_id for some in [attributes, *changed]}
        assert len(ids) == 1 + len(attributes)


# Methods of the build


def test_output_shapes_follow_the_contract(library):
    for levels in (1, 4, native.MAX_LEVELS):
        feature, rois = (tensor.shape for tensor in contract.MULTILEVEL_ROI_ALIGN.inputs)
        shape = tuple(
            str(ROI["output_size"]) if d == "S" else d for d in contract.MULTILEVEL_ROI_ALIGN.outputs[0].shape
        )
        assert library.create(ROI_ALIGN, ROI).output_shapes([feature] * levels + [rois]) == [shape]
    shapes = [tensor.shape for tensor in contract.BATCHED_NMS.outputs]
    wanted = [tuple(str(SUPPRESS["max_output"]) if d == "M" else d for d in shape) for shape in shapes]
    inputs = [tensor.shape for tensor in contract.BATCHED_NMS.inputs]
    assert library.create(NMS, SUPPRESS).output_shapes(inputs) == wanted


def test_wrong_numbers_and_ranks_of_inputs_are_errors(library, capfd):
    feature, rois = (tensor.shape for tensor in contract.MULTILEVEL_ROI_ALIGN.inputs)
    plugin = library.create(ROI_ALIGN, ROI)
    too_many = [feature] * (native.MAX_LEVELS + 1) + [rois]
    for inputs in ([rois], too_many, [feature, feature], [feature[1:], rois], [feature, rois[1:]]):
        assert plugin.output_shapes(inputs) is None
    assert plugin.output_types(["float32"]) is None
    suppress = library.create(NMS, SUPPRESS)
    shapes = [tensor.shape for tensor in contract.BATCHED_NMS.inputs]
    for inputs in (shapes[:2], [*shapes, shapes[0]], [shapes[1], *shapes[1:]]):
        assert suppress.output_shapes(inputs) is None
    assert capfd.readouterr().err.count("found: ") == 9


def test_types_of_outputs(library, capfd):
    plugin = library.create(ROI_ALIGN, ROI)
    for kind in TYPES:
        assert plugin.output_types([kind, kind, "float32"]) == [kind]
    for kinds in (["int8", "int8"], ["float16", "float32"], ["int32", "int32"]):
        assert plugin.output_types([*kinds, "float32"]) is None
    assert "cast the feature maps" in capfd.readouterr().err
    wanted = [tensor.dtype for tensor in contract.BATCHED_NMS.outputs]
    assert library.create(NMS, SUPPRESS).output_types(["float32", "int32", "int32"]) == wanted


def test_formats_of_roi_align(library):
    plugin = library.create(ROI_ALIGN, ROI)
    every = list(itertools.product(plugin_library.TYPES, plugin_library.FORMATS))
    wanted = {("float32", "LINEAR"), ("float16", "LINEAR"), ("bfloat16", "LINEAR")}
    wanted |= {("float32", "HWC"), ("float16", "HWC8"), ("bfloat16", "HWC8")}
    rest = [("int8", "LINEAR")] * 3  # ignored
    assert {first for first in every if plugin.supports(0, [first, *rest], 1)} == wanted
    for first in wanted:
        assert [t for t in every if plugin.supports(1, [first, t, *rest[:2]], 1)] == [first]
        assert [t for t in every if plugin.supports(2, [first, first, t, rest[0]], 1)] == [("float32", "LINEAR")]
        tensors = [first, first, ("float32", "LINEAR")]
        assert [t for t in every if plugin.supports(3, [*tensors, t], 1)] == [(first[0], "LINEAR")]


def test_formats_of_nms(library):
    plugin = library.create(NMS, SUPPRESS)
    kinds = [tensor.dtype for tensor in (*contract.BATCHED_NMS.inputs, *contract.BATCHED_NMS.outputs)]
    for position, kind in enumerate(kinds):
        for tensor in itertools.product(plugin_library.TYPES, plugin_library.FORMATS):
            tensors = [(k, "LINEAR") for k in kinds]
            tensors[position] = tensor
            assert plugin.supports(position, tensors, 2) == (tensor == (kind, "LINEAR"))


# Results


def pyramid(rng, sizes_hw, channels, batch=2, rois=5):
    """Features, and boxes of all levels, some outside the image."""
    features = [rng.standard_normal((batch, channels, *size_hw)).astype(np.float32) for size_hw in sizes_hw]
    corners = rng.uniform(-20, 100, (batch, rois, 2))
    sides = 2.0 ** rng.uniform(0, 7, (batch, rois, 2))
    return features, np.concatenate([corners, corners + sides], axis=-1).astype(np.float32)


def pool(plugin, features, rois, kind, layout, *, new_shapes=True):
    """Runs RoIAlign; features `[N, C, H, W]` float32."""
    laid, formats, shapes = [], {}, {}
    for place, feature in enumerate(features):
        given = rounded(feature, kind)
        pitch = {"LINEAR": None, "HWC": given.shape[1], "HWC8": -(-given.shape[1] // 8) * 8}[layout]
        laid.append(np.ascontiguousarray(channels_last(given, pitch) if pitch else given))
        formats[place], shapes[place] = layout, given.shape
    size = int(plugin.serialized()["output_size"])
    pooled, memory = guarded((*rois.shape[:2], features[0].shape[1], size, size), TYPES[kind])
    code = plugin.run([*laid, rois], [pooled], formats=formats, shapes=shapes, new_shapes=new_shapes)
    check_guards(memory)
    return code, single(pooled)


def expected_pool(features, rois, kind, attributes):
    return reference.multilevel_roi_align([single(rounded(f, kind)) for f in features], rois, **attributes)


@pytest.mark.parametrize(
    ("kind", "layout", "tolerance"),
    [
        *(("float32", "LINEAR", 1e-5), ("float32", "HWC", 1e-5), ("float16", "LINEAR", 2e-3)),
        *(("float16", "HWC8", 2e-3), ("bfloat16", "LINEAR", 1.6e-2), ("bfloat16", "HWC8", 1.6e-2)),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"aligned": 0, "sampling_ratio": 0, "output_size": 2, "canonical_size": 90.0}])
def test_roi_align_equals_the_reference(library, kind, layout, tolerance, changes):
    features, rois = pyramid(np.random.default_rng(3), [(24, 20), (12, 10), (6, 5)], channels=5)
    plugin = library.create(ROI_ALIGN, ROI | changes)
    stored = library.create(ROI_ALIGN, plugin.serialized(), at_runtime=True)
    wanted = expected_pool(features, rois, kind, ROI | changes)
    assert np.abs(wanted).max() > 0.5
    for runner in (plugin, plugin.attach(), stored.attach()):
        code, pooled = pool(runner, features, rois, kind, layout)
        assert code == 0
        np.testing.assert_allclose(pooled, wanted, rtol=tolerance, atol=tolerance)


def test_roi_align_with_one_level_and_the_maximum(library):
    rng = np.random.default_rng(4)
    for levels in (1, 2, native.MAX_LEVELS):
        features, rois = pyramid(rng, [(max(16 >> level, 1), 8) for level in range(levels)], channels=3, batch=1)
        code, pooled = pool(library.create(ROI_ALIGN, ROI), features, rois, "float32", "LINEAR")
        assert code == 0
        np.testing.assert_allclose(pooled, expected_pool(features, rois, "float32", ROI), rtol=1e-5, atol=1e-5)


def test_roi_align_keeps_the_number_of_levels_until_shapes_change(library, capfd):
    rng = np.random.default_rng(5)
    plugin = library.create(ROI_ALIGN, ROI)
    features, rois = pyramid(rng, [(8, 8), (4, 4)], channels=2, batch=1)
    assert pool(plugin, features, rois, "float32", "LINEAR", new_shapes=False)[0] != 0
    assert "1 inputs" in capfd.readouterr().err
    for _ in range(2):
        wanted = expected_pool(features, rois, "float32", ROI)
        for new_shapes in (True, False):
            code, pooled = pool(plugin, features, rois, "float32", "LINEAR", new_shapes=new_shapes)
            assert code == 0
            np.testing.assert_allclose(pooled, wanted, rtol=1e-5, atol=1e-5)
        clone = plugin.clone()
        assert pool(clone, features, rois, "float32", "LINEAR", new_shapes=False)[0] == 0
        features, rois = pyramid(rng, [(8, 12), (4, 6), (2, 3)], channels=2, batch=2)


def test_roi_align_without_boxes_and_with_empty_maps(library, capfd):
    features, rois = pyramid(np.random.default_rng(6), [(8, 8)], channels=2)
    plugin = library.create(ROI_ALIGN, ROI)
    code, pooled = pool(plugin, features, rois[:, :0], "float32", "LINEAR")
    assert code == 0 and pooled.shape == (2, 0, 2, 3, 3)
    assert pool(plugin, [features[0][:, :, :0]], rois, "float32", "LINEAR")[0] == native.INVALID
    assert "nothing was launched" in capfd.readouterr().err


def test_workspace_sizes(library):
    boxes, groups = np.zeros((3, 70, 4), np.float32), np.zeros((3, 70), np.int32)
    counts, num = np.zeros(3, np.int32), np.zeros(3, np.int32)
    plugin = library.create(NMS, SUPPRESS)
    code, size = plugin.configure([boxes, groups, counts], [np.zeros((3, 8), np.int32), num])
    assert code == 0 and size >= groups.nbytes
    features, rois = pyramid(np.random.default_rng(7), [(8, 8)], channels=2)
    assert library.create(ROI_ALIGN, ROI).configure([*features, rois], [rois]) == (0, 0)


@pytest.mark.parametrize("max_output", [1, 8, 200])
def test_nms_equals_the_reference(library, max_output):
    rng = np.random.default_rng(max_output)
    corners = rng.uniform(0, 60, (3, 90, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 30, (3, 90, 2))], axis=-1).astype(np.float32)
    groups, counts = rng.integers(0, 3, (3, 90)).astype(np.int32), np.int32([90, 0, 37])
    attributes = {"iou_threshold": 0.3, "max_output": max_output}
    indices, around_indices = guarded((3, max_output), np.int32)
    num, around_num = guarded((3,), np.int32)
    plugin = library.create(NMS, attributes).attach()
    code, size = plugin.configure([boxes, groups, counts], [indices, num])
    workspace, around_workspace = guarded((size,), np.uint8)
    assert code == 0 and plugin.run([boxes, groups, counts], [indices, num], workspace=workspace) == 0
    for memory in (around_indices, around_num, around_workspace):
        check_guards(memory)
    wanted = reference.batched_nms(boxes, groups, counts, **attributes)
    assert wanted[1][1] == 0 and wanted[1][0] == min(max_output, wanted[1][0])
    np.testing.assert_array_equal(indices, wanted[0])
    np.testing.assert_array_equal(num, wanted[1])
