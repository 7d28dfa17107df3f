"""Kernels of the ahead-of-time plugins: compilation, and results equal to the reference."""

import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import aot_on_cpu
import kernels_on_cpu
import numpy as np
import pytest
from aot_launch import NMS, POOLING, launch_of, tensor
from kernels_on_cpu import bfloat16, channels_last, check_guards, guarded, single

from maskrcnn.errors import UserError
from maskrcnn.plugins import aot, aot_kernels, build, contract, reference
from maskrcnn.plugins.aot_kernels import Image, architecture, compile_kernel, image_for, is_cached
from maskrcnn.plugins.toolchain import Toolchain, find_toolchain

needs_cpu_build = pytest.mark.skipif(
    kernels_on_cpu.compiler() is None or not sys.platform.startswith("linux"), reason="no C++ compiler on Linux"
)


@pytest.fixture(scope="module")
def toolchain() -> Toolchain:
    found = find_toolchain()
    if found.nvrtc is None and found.nvcc is None:
        pytest.skip("neither NVRTC nor nvcc")
    return found


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path))
    return tmp_path / "plugins"


def roi_align(*, num_levels: int = 4, layout: str = "LINEAR", channels: int | None = None, **changes):
    """The kernel of MultilevelRoiAlign in float32 with changed attributes."""
    options = {"num_levels": num_levels, "dtype": "float32", "layout": layout, "channels": channels}
    return aot_kernels.roi_align({**POOLING, **changes}, **options)


# Compiling


@pytest.mark.parametrize("layout", ["LINEAR", "HWC", "HWC8"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_roi_align_compiles_for_every_type_and_layout(toolchain, dtype, layout):
    for ratio, num_levels, size, channels in ((2, 4, 7, 256), (0, 1, 14, None), (3, 16, 1, 5), (2, 2, 28, None)):
        attributes = {**POOLING, "sampling_ratio": ratio, "output_size": size, "aligned": ratio % 2}
        found = aot_kernels.roi_align(attributes, num_levels=num_levels, dtype=dtype, layout=layout, channels=channels)
        code = compile_kernel(found.kernel, arch=90, toolchain=toolchain, image=Image.PTX).decode()
        (entry, parameters) = re.search(r"\.visible \.entry (\w+)\((.*?)\)", code, flags=re.DOTALL).groups()
        assert entry == found.kernel.name
        kinds = re.findall(r"\.param \.(\w+)", parameters)
        assert kinds == ["u64"] * (num_levels + 1) + ["u32"] * (3 + 2 * num_levels) + ["u64"]


def test_the_kernels_of_nms_compile(toolchain):
    for kernel, kinds in (
        (aot_kernels.nms_keep(NMS), ["u64"] * 3 + ["u32"] * 2 + ["u64"]),
        (aot_kernels.nms_compact({"max_output": 20}), ["u64"] + ["u32"] * 2 + ["u64"] * 2),
    ):
        code = compile_kernel(kernel, arch=80, toolchain=toolchain, image=Image.PTX).decode()
        parameters = re.search(rf"\.visible \.entry {kernel.name}\((.*?)\)", code, flags=re.DOTALL)[1]
        assert re.findall(r"\.param \.(\w+)", parameters) == kinds
        assert ".target sm_80" in code


def test_both_compilers_and_formats(toolchain):
    kernel = aot_kernels.nms_compact({"max_output": 20})
    for without in ("nvcc", "nvrtc"):
        one = replace(toolchain, **{without: None})
        if one.nvcc is None and one.nvrtc is None:
            continue
        arch = max((one.nvrtc or one.nvcc).architectures)
        code = {i: compile_kernel(kernel, arch=arch, toolchain=one, image=i) for i in Image}
        assert code[Image.CUBIN].startswith(b"\x7fELF")
        assert f".entry {kernel.name}(".encode() in code[Image.PTX]
        broken = replace(kernel, defines={**kernel.defines, "MASKRCNN_THREADS": "7"})
        with pytest.raises(UserError, match=rf"failed on {kernel.name}(.|\n)*starts blocks of the size"):
            compile_kernel(broken, arch=arch, toolchain=one, image=Image.PTX)


def test_a_kernel_is_compiled_once(toolchain, cache_folder, monkeypatch):
    kernel, options = aot_kernels.nms_compact({"max_output": 20}), {"arch": 90, "image": Image.PTX}
    assert not is_cached(kernel, toolchain=toolchain, **options)
    code = compile_kernel(kernel, toolchain=toolchain, **options)
    assert is_cached(kernel, toolchain=toolchain, **options)
    monkeypatch.setattr(build, "make_folder", lambda *_: pytest.fail("compiled again"))
    assert compile_kernel(kernel, toolchain=toolchain, **options) == code
    assert len(list(cache_folder.iterdir())) == 1
    other = replace(kernel, defines={**kernel.defines, "MASKRCNN_MAX_OUTPUT": "21"})
    assert not is_cached(other, toolchain=toolchain, **options)
    assert not is_cached(kernel, toolchain=toolchain, **{**options, "arch": 80})


def test_architecture_and_format():
    known = SimpleNamespace(version="13.2", architectures=(80, 90, 120))
    none = Toolchain(nvrtc=known)
    assert architecture(none, 90) == 90
    assert architecture(replace(none, gpus=(86, 120))) == 80  # PTX runs on both
    assert architecture(replace(none, gpus=(121,))) == 120
    with pytest.raises(UserError, match="no GPU on this machine, and no architecture given"):
        architecture(none)
    with pytest.raises(UserError, match="architecture 75\n  expected: one of 80, 90, 120"):
        architecture(none, 75)
    with pytest.raises(UserError, match="GPUs of compute capabilities 86, 120\n  expected: one generation"):
        architecture(replace(none, gpus=(86, 120)), image=Image.CUBIN)
    assert architecture(replace(none, gpus=(86, 89)), image=Image.CUBIN) == 80
    with pytest.raises(UserError, match="neither NVRTC nor nvcc on this machine"):
        architecture(Toolchain(gpus=(90,)))
    images = {driver: image_for(replace(none, driver_cuda=driver)) for driver in (None, (13, 0), (13, 2), (14, 0))}
    assert [image.value for image in images.values()] == ["ptx", "cubin", "ptx", "ptx"]


def constant(name: str, file: str) -> int:
    """A constant of the kernels' sources."""
    text = (build.SOURCES / "multilevel_roi_align" / file).read_text()
    return int(re.search(rf"{name} = (\d+)", text)[1])


def test_grids_use_the_constants_of_the_kernels():
    pooling = {layout: roi_align(layout=layout, channels=8) for layout in ("LINEAR", "HWC8")}
    assert pooling["LINEAR"].channels_of_block == constant("kPlanesOfBlock", "launch.cu")
    assert pooling["HWC8"].channels_of_block == 32 * constant("kLaneBytes", "kernel.cuh") // 4  # float32
    side = int(constant("kMostBins", "kernel.cuh") ** 0.5)
    assert [roi_align(layout="HWC8", output_size=size).parts for size in (side, side + 1)] == [1, 2]


def test_every_aot_op_has_a_plugin():
    assert [plugin.op for plugin in aot.PLUGINS] == list(contract.AOT_OPS.values())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"output_size": 0}, "output_size = 0\n  expected: 1 to 32767"),
        ({"aligned": 2}, "aligned = 2\n  expected: 0 to 1"),
        ({"canonical_size": float("nan")}, "canonical_size = nan"),
        ({"speed": 1}, "the attributes output_size, .*, speed\n  expected: output_size, "),
    ],
)
def test_attributes_outside_the_contract(change, sentence):
    with pytest.raises(UserError, match=f"MultilevelRoiAlign with.*{sentence}"):
        roi_align(**change)


def test_too_many_levels():
    with pytest.raises(UserError, match="with 17 feature maps\n  expected: 1 to 16"):
        roi_align(num_levels=17)


# Results


def pyramid(rng, num_levels: int, channels: int, dtype: str) -> list[np.ndarray]:
    sizes = [(2, channels, max(24 >> level, 1), max(40 >> level, 1)) for level in range(num_levels)]
    features = [rng.normal(size=size).astype(np.float32) for size in sizes]
    return [bfloat16(f) if dtype == "bfloat16" else f.astype(dtype) for f in features]


def some_rois(rng) -> np.ndarray:
    """Five RoIs for each of two images of 160 x 96 px: random, larger than the image, empty, inverted, NaN."""
    rois = rng.uniform(-20, 150, (2, 5, 4)).astype(np.float32)
    rois[..., 2:] += rois[..., :2]
    rois[0, :3] = [[-50, -60, 400, 500], [30, 30, 30, 30], [40, 50, 20, 10]]
    rois[1, 0] = np.nan
    return rois


CASES = {  # dtype, layout, channels, levels, changes of the attributes
    "planes": ("float32", "LINEAR", 70, 4, {}),
    "planes adaptive": ("float16", "LINEAR", 3, 2, {"sampling_ratio": 0, "aligned": 1, "output_size": 3}),
    "channels last": ("float32", "HWC", 8, 5, {"aligned": 1}),
    "channels last, odd": ("float32", "HWC", 35, 1, {"sampling_ratio": 3, "output_size": 2, "min_level": 3}),
    "vectors, parts": ("float16", "HWC8", 133, 3, {"output_size": 9}),
    "vectors adaptive": ("bfloat16", "HWC8", 5, 2, {"sampling_ratio": 0}),
}


@needs_cpu_build
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_roi_align_equals_the_reference(case, tmp_path):
    dtype, layout, channels, num_levels, changes = case
    rng, attributes = np.random.default_rng(channels), {**POOLING, **changes}
    features, rois = pyramid(rng, num_levels, channels, dtype), some_rois(rng)
    descs = [*(tensor(f.shape, dtype, layout) for f in features), tensor(rois.shape, "float32")]
    launch = launch_of(contract.MULTILEVEL_ROI_ALIGN, descs, attributes)
    pitch = -(-channels // (8 if layout == "HWC8" else 1)) * (8 if layout == "HWC8" else 1)
    laid = [np.ascontiguousarray(f) if layout == "LINEAR" else channels_last(f, pitch) for f in features]
    size = attributes["output_size"]
    pooled, around = guarded((2, 5, channels, size, size), features[0].dtype)
    library = aot_on_cpu.build(launch.kernel, tmp_path)
    aot_on_cpu.run(library, launch.kernel, launch.grid, [*laid, rois], launch.arguments, [pooled])
    check_guards(around)
    with np.errstate(invalid="ignore"):
        truth = reference.multilevel_roi_align([single(f) for f in features], rois, **attributes)
    rounding = {"float32": 2e-5, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    np.testing.assert_allclose(single(pooled), truth, rtol=rounding, atol=rounding)


@pytest.fixture(scope="module")
def nms_on_cpu(tmp_path_factory):
    """Both kernels, compiled once."""
    if kernels_on_cpu.compiler() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("nms")
    kernels = aot_kernels.nms_keep(NMS), aot_kernels.nms_compact({"max_output": NMS["max_output"]})
    return [aot_on_cpu.build(kernel, folder) for kernel in kernels]


@needs_cpu_build
@pytest.mark.parametrize(("num_boxes", "num_groups"), [(0, 1), (1, 1), (130, 3), (300, 90)])
def test_nms_in_two_kernels_equals_the_reference(nms_on_cpu, num_boxes, num_groups):
    rng = np.random.default_rng(num_boxes)
    boxes = rng.uniform(0, 50, (3, num_boxes, 4)).astype(np.float32)
    boxes[..., 2:] += boxes[..., :2]
    groups = rng.integers(0, num_groups, (3, num_boxes)).astype(np.int32)
    counts = np.array([num_boxes, num_boxes // 2, 0], np.int32)
    keep, around_keep = guarded((3, num_boxes), np.int32)
    descs = [tensor(boxes.shape, "float32"), tensor(groups.shape, "int32"), tensor(counts.shape, "int32")]
    first = launch_of(contract.BATCHED_NMS_KEEP, descs, NMS)
    aot_on_cpu.run(nms_on_cpu[0], first.kernel, first.grid, [boxes, groups, counts], first.arguments, [keep])
    check_guards(around_keep)
    expected = reference.batched_nms_keep(boxes, groups, counts, **NMS)
    within = np.cumsum(expected, axis=1) <= NMS["max_output"]
    np.testing.assert_array_equal(keep[within], expected[within])
    assert set(np.unique(keep)) <= {0, 1}
    indices, around_indices = guarded((3, NMS["max_output"]), np.int32)
    num, around_num = guarded((3,), np.int32)
    attributes = {"max_output": NMS["max_output"]}
    second = launch_of(contract.BATCHED_NMS_COMPACT, [tensor(keep.shape, "int32")], attributes)
    aot_on_cpu.run(nms_on_cpu[1], second.kernel, second.grid, [keep], second.arguments, [indices, num])
    check_guards(around_indices), check_guards(around_num)
    truth = reference.batched_nms(boxes, groups, counts, **NMS)
    np.testing.assert_array_equal(indices, truth[0])
    np.testing.assert_array_equal(num, truth[1])


def test_the_grid_of_an_empty_dimension_has_one_block():
    for shape in ((0, 5, 4), (2, 0, 4)):
        descs = [tensor((shape[0], 8, 4, 4), "float32"), tensor(shape, "float32")]
        assert min(launch_of(contract.MULTILEVEL_ROI_ALIGN, descs, POOLING).grid) == 1
    descs = [tensor((0, 0, 4), "float32"), tensor((0, 0), "int32"), tensor((0,), "int32")]
    assert launch_of(contract.BATCHED_NMS_KEEP, descs, NMS).grid == (1, 1)
    assert launch_of(contract.BATCHED_NMS_COMPACT, [tensor((0, 0), "int32")], {"max_output": 1}).grid == (1, 1)
