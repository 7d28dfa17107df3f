"""The kernels of ahead-of-time plugins: each compiles, and computes what the reference does."""

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
from maskrcnn.plugins import aot, aot_kernels, contract, native, nvrtc, reference
from maskrcnn.plugins import build as cache
from maskrcnn.plugins.aot_kernels import HWC, HWC8, PLANES
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


# Compiling


@pytest.mark.parametrize("layout", [PLANES, HWC, HWC8], ids=["planes", "HWC", "HWC8"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_kind_of_roi_align_compiles(toolchain, dtype, layout):
    for ratio, num_levels, size, channels in ((2, 4, 7, 256), (0, 1, 14, None), (3, 16, 1, 5), (2, 2, 28, None)):
        attributes = {**POOLING, "sampling_ratio": ratio, "output_size": size, "aligned": ratio % 2}
        made = aot_kernels.roi_align(attributes, num_levels=num_levels, dtype=dtype, layout=layout, channels=channels)
        code = nvrtc.compile_kernel(made.kernel, arch=90, toolchain=toolchain, image=nvrtc.Image.PTX).decode()
        (entry, parameters) = re.search(r"\.visible \.entry (\w+)\((.*?)\)", code, flags=re.DOTALL).groups()
        assert entry == made.kernel.name
        kinds = re.findall(r"\.param \.(\w+)", parameters)
        assert kinds == ["u64"] * (num_levels + 1) + ["u32"] * (3 + 2 * num_levels) + ["u64"]


def test_the_kernels_of_nms_compile(toolchain):
    for kernel, kinds in (
        (aot_kernels.nms_keep(NMS), ["u64"] * 3 + ["u32"] * 2 + ["u64"]),
        (aot_kernels.nms_compact({"max_output": 20}), ["u64"] + ["u32"] * 2 + ["u64"] * 2),
    ):
        code = nvrtc.compile_kernel(kernel, arch=80, toolchain=toolchain, image=nvrtc.Image.PTX).decode()
        parameters = re.search(rf"\.visible \.entry {kernel.name}\((.*?)\)", code, flags=re.DOTALL)[1]
        assert re.findall(r"\.param \.(\w+)", parameters) == kinds
        assert ".target sm_80" in code


def test_machine_code_and_both_compilers(toolchain):
    kernel = aot_kernels.nms_compact({"max_output": 20})
    for without in ("nvcc", "nvrtc"):
        one = replace(toolchain, **{without: None})
        if one.nvcc is None and one.nvrtc is None:
            continue
        arch = max((one.nvrtc or one.nvcc).architectures)
        code = {i: nvrtc.compile_kernel(kernel, arch=arch, toolchain=one, image=i) for i in nvrtc.Image}
        assert code[nvrtc.Image.CUBIN].startswith(b"\x7fELF")
        assert f".entry {kernel.name}(".encode() in code[nvrtc.Image.PTX]
        broken = replace(kernel, defines={**kernel.defines, "MASKRCNN_THREADS": "7"})
        with pytest.raises(UserError, match=rf"failed on {kernel.name}(.|\n)*starts blocks of the size"):
            nvrtc.compile_kernel(broken, arch=arch, toolchain=one, image=nvrtc.Image.PTX)


def test_a_kernel_is_compiled_once(toolchain, cache_folder, monkeypatch):
    kernel, options = aot_kernels.nms_compact({"max_output": 20}), {"arch": 90, "image": nvrtc.Image.PTX}
    assert not nvrtc.is_cached(kernel, toolchain=toolchain, **options)
    code = nvrtc.compile_kernel(kernel, toolchain=toolchain, **options)
    assert nvrtc.is_cached(kernel, toolchain=toolchain, **options)
    for name in ("_by_nvrtc", "_by_nvcc"):
        monkeypatch.setattr(nvrtc, name, lambda *_: pytest.fail("compiled again"))
    assert nvrtc.compile_kernel(kernel, toolchain=toolchain, **options) == code
    assert len(list(cache_folder.iterdir())) == 1
    other = replace(kernel, defines={**kernel.defines, "MASKRCNN_MAX_OUTPUT": "21"})
    assert not nvrtc.is_cached(other, toolchain=toolchain, **options)
    assert not nvrtc.is_cached(kernel, toolchain=toolchain, **{**options, "arch": 80})


def test_what_to_compile_for():
    known = SimpleNamespace(version="13.2", architectures=(80, 90, 120))
    none = Toolchain(nvrtc=known)
    assert nvrtc.architecture(none, 90) == 90
    assert nvrtc.architecture(replace(none, gpus=(86, 120))) == 80  # PTX that both run
    assert nvrtc.architecture(replace(none, gpus=(121,))) == 120
    with pytest.raises(UserError, match="no GPU on this machine, and no architecture named"):
        nvrtc.architecture(none)
    with pytest.raises(UserError, match="architecture 75\nexpected: one of 80, 90, 120"):
        nvrtc.architecture(none, 75)
    with pytest.raises(UserError, match="machine code for GPUs of the capabilities 86, 120\nexpected: one generation"):
        nvrtc.architecture(replace(none, gpus=(86, 120)), image=nvrtc.Image.CUBIN)
    assert nvrtc.architecture(replace(none, gpus=(86, 89)), image=nvrtc.Image.CUBIN) == 80
    with pytest.raises(UserError, match="neither NVRTC nor nvcc on this machine"):
        nvrtc.architecture(Toolchain(gpus=(90,)))
    images = {
        driver: nvrtc.image_for(replace(none, driver_cuda=driver)) for driver in (None, (13, 0), (13, 2), (14, 0))
    }
    assert [image.value for image in images.values()] == ["ptx", "cubin", "ptx", "ptx"]


def test_sizes_that_are_written_down_twice():
    launch = (cache.SOURCES / "multilevel_roi_align" / "launch.cu").read_text()
    assert int(re.search(r"kPlanesOfBlock = (\d+)", launch)[1]) == aot_kernels._PLANES_OF_BLOCK
    kernel = (cache.SOURCES / "multilevel_roi_align" / "kernel.cuh").read_text()
    assert int(re.search(r"kLanesOfChannels = (\d+)", kernel)[1]) == aot_kernels._LANES_OF_CHANNELS
    assert int(re.search(r"kBinsOfTile = (\d+)", kernel)[1]) == aot_kernels._BINS_OF_TILE
    assert aot_kernels.MOST_LEVELS == native.MAX_LEVELS
    assert aot_kernels._LIMITS.keys() == {name for op in contract.AOT_OPS.values() for name in op.attributes}
    assert [plugin.op for plugin in aot.PLUGINS] == list(contract.AOT_OPS.values())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"output_size": 0}, "output_size = 0\nexpected: 1 to 32767"),
        ({"aligned": 2}, "aligned = 2\nexpected: 0 to 1"),
        ({"canonical_size": float("nan")}, "canonical_size = nan"),
        ({"speed": 1}, "the attributes output_size, .*, speed\nexpected: output_size, "),
    ],
)
def test_attributes_outside_the_contract(change, sentence):
    with pytest.raises(UserError, match=f"MultilevelRoiAlign with.*{sentence}"):
        aot_kernels.roi_align({**POOLING, **change}, num_levels=4, dtype="float32", layout=PLANES, channels=None)


def test_more_levels_than_the_kernel_takes():
    with pytest.raises(UserError, match="with 17 feature maps\nexpected: 1 to 16"):
        aot_kernels.roi_align(POOLING, num_levels=17, dtype="float32", layout=PLANES, channels=None)


# Numbers


def pyramid(rng, num_levels: int, channels: int, dtype: str) -> list[np.ndarray]:
    sizes = [(2, channels, max(24 >> level, 1), max(40 >> level, 1)) for level in range(num_levels)]
    features = [rng.normal(size=size).astype(np.float32) for size in sizes]
    return [bfloat16(f) if dtype == "bfloat16" else f.astype(dtype) for f in features]


def some_rois(rng) -> np.ndarray:
    """Two images of five: anywhere in 160 x 96 px, larger than it, empty, upside down, not a number."""
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
def test_roi_align_computes_what_the_reference_does(case, tmp_path):
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
def test_nms_in_two_kernels_computes_what_the_reference_does(nms_on_cpu, num_boxes, num_groups):
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
    wanted = reference.batched_nms_keep(boxes, groups, counts, **NMS)
    within = np.cumsum(wanted, axis=1) <= NMS["max_output"]
    np.testing.assert_array_equal(keep[within], wanted[within])
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


def test_an_empty_dimension_still_makes_a_grid():
    for shape in ((0, 5, 4), (2, 0, 4)):
        descs = [tensor((shape[0], 8, 4, 4), "float32"), tensor(shape, "float32")]
        assert min(launch_of(contract.MULTILEVEL_ROI_ALIGN, descs, POOLING).grid) == 1
    descs = [tensor((0, 0, 4), "float32"), tensor((0, 0), "int32"), tensor((0,), "int32")]
    assert launch_of(contract.BATCHED_NMS_KEEP, descs, NMS).grid == (1, 1)
    assert launch_of(contract.BATCHED_NMS_COMPACT, [tensor((0, 0), "int32")], {"max_output": 1}).grid == (1, 1)
