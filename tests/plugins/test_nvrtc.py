"""Kernels compiled by NVRTC: each is chosen, started and named as the compiled library would."""

import os
import subprocess
import sys

import kernels_on_cpu
import numpy as np
import nvrtc_on_cpu
import pytest
import torch
from kernel_calls import nms, paste, resize_pad, roi_align, roi_align_gradient
from roi_align_cases import as_dtype

from maskrcnn.errors import UserError
from maskrcnn.plugins import native, nvrtc, toolchain
from maskrcnn.plugins.nvrtc import Gpu

needs_nvrtc = pytest.mark.skipif(toolchain.find_nvrtc() is None, reason="no NVRTC")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path))
    monkeypatch.delenv(native.SWITCH, raising=False)
    native._kernels.cache_clear()
    yield tmp_path
    native._kernels.cache_clear()


# Type, result in float32, layout, pitch of 9 channels, shift, sampling ratio, output size.
POOLINGS = [
    ("float32", False, "NCHW", 0, 0, 2, 7),
    ("bfloat16", True, "NCHW", 0, 0, 0, 3),
    ("float32", False, "NHWC", 9, 0, 2, 7),
    ("float32", False, "NHWC", 16, 1, 2, 7),  # pixels that do not begin at 16 bytes
    ("float32", False, "NHWC", 16, 0, 2, 14),
    ("bfloat16", False, "NHWC", 16, 0, 3, 9),
    ("float16", False, "NHWC", 16, 0, 2, 7),
    ("float16", True, "NHWC", 16, 0, 2, 33),  # more samples than the table of taps holds
]


def results(device):
    """Results of each kind of kernel."""
    rng = np.random.default_rng(4)
    corners = rng.uniform(-10, 130, (2, 6, 2))
    rois = np.concatenate([corners, corners + rng.uniform(0, 90, (2, 6, 2))], axis=-1)
    found = {}
    for case in POOLINGS:
        kind, to_float32, layout, pitch, shift, ratio, size = case
        maps = [as_dtype(rng.normal(size=(2, 9, side, side + 3)).astype(np.float32), kind) for side in (32, 16)]
        given = {"output_size": size, "sampling_ratio": ratio, "aligned": size == 7, "float32_output": to_float32}
        found[case] = roi_align(device, maps, rois, layout=layout, pitch=pitch, shift=shift, **given)
    for kind, size in (("float32", 7), ("float16", 9)):
        pooled = as_dtype(rng.normal(size=(2, 6, 33, size, size)).astype(np.float32), kind)
        given = {"output_size": size, "sampling_ratio": 2, "aligned": True}
        found["gradient", kind] = roi_align_gradient(device, pooled, rois, [(32, 35), (16, 19)], **given)
    for number, limit in ((1, 1), (70, 20), (3000, 400)):
        boxes = rng.uniform(0, 200, (3, number, 4))
        boxes[..., 2:] = boxes[..., :2] + rng.uniform(0, 60, (3, number, 2))
        groups, counts = rng.integers(0, 9, (3, number)), np.array([number, number // 2, 0])
        kept = nms(device, boxes, groups, counts, iou_threshold=0.3, max_output=limit)
        found["nms", number] = np.concatenate([each.ravel() for each in kept])
    for kind in (np.float32, np.float16):
        for by_columns in (False, True):
            masks, boxes = rng.random((5, 28, 28)).astype(kind), rng.uniform(0, 90, (5, 4))
            found["paste", kind, by_columns] = paste(device, masks, boxes, (45, 90), 0.5, by_columns=by_columns)
    image = rng.integers(0, 256, (37, 51, 3), np.uint8)
    for swaps in (False, True):
        found["resize", swaps] = resize_pad(device, image, (70, 133), (72, 140), swap_channels=swaps)
    return found


def test_results_equal_the_compiled_library(cpu, nvrtc, launcher):
    wanted = results(cpu)
    for case, found in results(nvrtc).items():
        np.testing.assert_array_equal(found, wanted[case], str(case))
    assert launcher.started == {name for names in nvrtc_on_cpu.KERNELS.values() for name in names}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_results_equal_the_compiled_library_on_a_gpu(gpu, gpu_nvrtc):
    wanted = results(gpu)
    for case, found in results(gpu_nvrtc).items():
        tolerance = 1e-4 if case[0] == "gradient" else 0  # whose sums have no fixed order
        np.testing.assert_allclose(found, wanted[case], rtol=0, atol=tolerance, err_msg=str(case))


@needs_nvrtc
@pytest.mark.parametrize("op", nvrtc_on_cpu.KERNELS)
def test_every_kind_of_kernel_compiles(cache, op):
    for name in nvrtc_on_cpu.KERNELS[op]:
        code, symbol = Gpu(90).compile(op, name)
        assert code[:4] == b"\x7fELF" and symbol.encode() in code


@needs_nvrtc
@pytest.mark.parametrize(("arch", "start"), [(89, b"\x7fELF"), (75, b"\x7fELF"), (990, b"//")], ids=str)
def test_gpus_between_and_beyond_the_compilers_architectures(cache, arch, start):
    """The nearest older machine code of the generation, otherwise PTX."""
    code, symbol = Gpu(arch).compile("batched_nms", "keep_kernel")
    assert code.startswith(start) and symbol.encode() in code


DRIVER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
typedef int Result;
typedef void *Pointer;
static __thread Pointer current;
Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuDeviceGet(int *device, int number) { *device = number; return 0; }
Result cuCtxGetCurrent(Pointer *context) { *context = current; return 0; }
Result cuCtxSetCurrent(Pointer context) { current = context; return printf("context %ld\n", (long)context) < 0; }
Result cuDevicePrimaryCtxRetain(Pointer *context, int device) { *context = (Pointer)(100L + device); return 0; }
Result cuPointerGetAttribute(void *value, int attribute, unsigned long long address) {
    *(int *)value = attribute == 9 && address == 0x1000 ? 3 : 0;  /* CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL */
    return 0;
}
Result cuLibraryLoadData(Pointer *library, const char *code, Pointer a, Pointer b, unsigned c, Pointer d, Pointer e,
                         unsigned f) {
    *library = (Pointer)7L;
    return code[1] == 'E' ? 0 : 200;
}
Result cuLibraryGetKernel(Pointer *kernel, Pointer library, const char *name) {
    *kernel = (Pointer)9L;
    return printf("%s\n", name) < 0;
}
Result cuLaunchKernel(Pointer f, unsigned x, unsigned y, unsigned z, unsigned u, unsigned v, unsigned w,
                      unsigned shared, Pointer stream, void **a, void **extra) {
    printf("kernel %ld: %u %u %u blocks, %u %u %u threads, stream %ld:", (long)f, x, y, z, u, v, w, (long)stream);
    if (y == 2) printf(" %p %p %p %d %g %d %p", *(Pointer *)a[0], *(Pointer *)a[1], *(Pointer *)a[2], *(int *)a[3],
                       *(float *)a[4], *(int *)a[5], *(Pointer *)a[6]);
    return printf("\n") < 0 || x == 4 ? 700 : 0;
}
Result cuGetErrorString(int code, const char **text) { *text = "an illegal memory access"; return 0; }
Result cuGetProcAddress_v2(const char *name, Pointer *address, int version, unsigned long long flags, int *found) {
    *address = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), name);
    if (found) *found = *address ? 0 : 1;
    return 0;
}
Result cuGetProcAddress(const char *name, Pointer *address, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, address, version, flags, 0);
}
"""
PROGRAM = """
import threading
from maskrcnn.plugins import native

kernels = native.kernels_for(90)
print(kernels.origin, flush=True)

def run(boxes):
    kernels.batched_nms(0x1000, 0x2000, 0x3000, batch=2, num_boxes=boxes, iou_threshold=0.25, max_output=10,
                        workspace=0x4000, indices=0x5000, num=0x6000, stream=77)

run(1000)
thread = threading.Thread(target=run, args=[500])
thread.start()
thread.join()
try:
    run(128)
except RuntimeError as error:
    print(error)
"""


@needs_nvrtc
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a driver library of Linux")
def test_kernels_start_through_nvidias_bindings(cache, kernels_for_cpu):
    """A driver that prints what NVIDIA's bindings give to it."""
    for name in nvrtc_on_cpu.KERNELS["batched_nms"]:
        Gpu(90).compile("batched_nms", name)  # here, since NVRTC calls more of a driver
    (cache / "driver.c").write_text(DRIVER)
    command = [kernels_on_cpu.compiler(), "-x", "c", "-w", "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.c", "-ldl"]
    subprocess.run(command, cwd=cache, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(cache), "MASKRCNN_KERNELS": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    first, *called = [line for line in lines if not line.startswith("_Z")]
    assert first.startswith("compiled by NVRTC") and first.endswith("for compute capability 9.0")
    keep = "kernel 9: {} 2 1 blocks, 1024 1 1 threads, stream 77: 0x1000 0x2000 0x3000 {} 0.25 10 0x4000"
    compact = "kernel 9: 2 1 1 blocks, 1024 1 1 threads, stream 77:"
    wanted = ["context 103", keep.format(31, 1000), compact, "context 103", keep.format(15, 500), compact]
    wanted += [
        keep.format(4, 128),
        "found: CUDA error 700, an illegal memory access; expected: a started kernel; fix: ",
    ]
    assert [line[: len(each)] for line, each in zip(called, wanted, strict=True)] == wanted
    assert sum(line.startswith("_Z") for line in lines) == 2, "each kernel is loaded once"


@needs_nvrtc
@pytest.mark.parametrize("step", ["compile", "load"])
def test_kernels_that_do_not_compile_or_load_are_a_warning(cache, monkeypatch, step):
    def fail(*arguments):
        raise UserError("NVRTC failed", "sources that compile", "try another CUDA version")

    if step == "compile":
        monkeypatch.setattr(nvrtc.Gpu, "compile", fail)
    else:
        monkeypatch.setattr(nvrtc, "_loaded", fail)
    with pytest.warns(UserWarning, match="kernels are not used, so inference is slower: NVRTC failed"):
        assert native.kernels_for(90) is None
    monkeypatch.setenv(native.SWITCH, "off")
    assert native.kernels_for(90) is None


def test_without_nvrtc_there_are_no_kernels(cache, monkeypatch):
    monkeypatch.setattr(toolchain, "find_nvrtc", lambda: None)
    assert native.kernels_for(90) is None
