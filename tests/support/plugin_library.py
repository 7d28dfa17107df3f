"""libmaskrcnn_plugins.so with kernels for the CPU, and calls of its plugins like TensorRT's.

The library is compiled from its normal sources; `cuda_on_cpu.h` replaces CUDA for the kernels.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import kernels_on_cpu
import numpy as np

from maskrcnn.plugins.toolchain import find_cuda_headers, find_tensorrt_headers

CSRC = kernels_on_cpu.ROOT / "plugins" / "csrc"
HARNESS = Path(__file__).parent / "plugin_harness" / "plugin_harness.cpp"
# Enumeration values of NvInferRuntime.h; test_rig.py compares them with TensorRT's.
TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "bfloat16": 7, "int64": 8}
FORMATS = {"LINEAR": 0, "CHW2": 1, "HWC8": 2, "CHW4": 3, "CHW16": 4, "CHW32": 5, "HWC": 8, "HWC16": 11}
FIELD_TYPES = {"float16": 0, "float32": 1, "float64": 2, "int8": 3, "int32": 5, "char": 6, "int64": 10}
_TYPES_OF_FIELDS = {np.float32: "float32", np.float64: "float64", np.int32: "int32", np.int64: "int64"}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
        ("address", ctypes.c_void_p),
    )


class _Field(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


def header_folders() -> list[Path]:
    """Folders of TensorRT's headers, from TENSORRT_INCLUDE_DIR or the usual places; may be empty."""
    named = [Path(folder) for folder in os.environ.get("TENSORRT_INCLUDE_DIR", "").split(os.pathsep) if folder]
    found = [find_tensorrt_headers(folder) for folder in named or [None]]
    return [headers.folder for headers in found if headers]


def obstacle() -> str | None:
    """Returns the reason why the library cannot be compiled for the CPU, or None."""
    if not header_folders():
        return "no TensorRT headers: set TENSORRT_INCLUDE_DIR"
    if find_cuda_headers(None) is None:
        return "no CUDA headers: pip install nvidia-cuda-runtime"
    return None if kernels_on_cpu.compiler() else "no C++ compiler"


def compile_library(output: Path, headers: Path, sources: Sequence[Path], *flags: str) -> Path:
    """Compiles C++ with TensorRT's headers; no undefined symbols means that TensorRT is not linked."""
    includes = ["-I", str(kernels_on_cpu.HEADERS)]
    for folder in (headers, find_cuda_headers(None)):
        includes += ["-isystem", str(folder)]
    shape = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,--no-undefined", "-Wl,-Bsymbolic"]
    checks = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-deprecated-declarations"]
    words = [str(kernels_on_cpu.compiler()), *shape, *checks, *flags, *includes, "-x", "c++", *map(str, sources)]
    done = subprocess.run([*words, "-o", str(output), "-ldl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def build(folder: Path, headers: Path) -> Path:
    """Compiles `libmaskrcnn_plugins.so` with kernels for the CPU."""
    sources = [CSRC / name for name in kernels_on_cpu.SOURCES] + sorted(CSRC.rglob("*.cpp"))
    # As in kernels_on_cpu.
    flags = ["-ffp-contract=off", "-U_FORTIFY_SOURCE", "-DMASKRCNN_ON_CPU", "-Wno-unused-parameter"]
    return compile_library(folder / "libmaskrcnn_plugins.so", headers, sources, *flags)


class Library:
    """A loaded plugin library and the harness that calls it.

    Args:
        path: the library, for any device.
        folder: output folder of the harness.
        headers: TensorRT's headers that the library was compiled with.
    """

    def __init__(self, path: Path, folder: Path, headers: Path) -> None:
        self.path, self.headers = path, headers
        self._plugins = ctypes.CDLL(str(path))
        harness = compile_library(folder / "libplugin_harness.so", headers, [HARNESS], "-fvisibility=default")
        self.harness = ctypes.CDLL(str(harness))
        for name in ("create", "clone", "attach"):
            getattr(self.harness, f"harness_{name}").restype = ctypes.c_void_p
        for name in ("creator_name", "plugin_name", "timing_id"):
            getattr(self.harness, f"harness_{name}").restype = ctypes.c_char_p
        count = ctypes.c_int32()
        self._plugins.getCreators.restype = ctypes.POINTER(ctypes.c_void_p)
        self._creators = self._plugins.getCreators(ctypes.byref(count))[: count.value]

    def _identity(self, kind: str, address: int) -> tuple[str, str, str]:
        ask = getattr(self.harness, f"harness_{kind}_name")
        name, version, namespace = (ask(ctypes.c_void_p(address), which).decode() for which in range(3))
        return name, version, namespace

    def create(self, op: str, attributes: Mapping[str, object], *, at_runtime: bool = False) -> Plugin | None:
        """Creates a plugin, or None if its creator rejects the attributes.

        Args:
            op: name of the op.
            attributes: NumPy scalars or arrays; a Python int becomes an int32 and a float a float32, as from the ONNX
                parser. A pair is (name of the field type, array).
        """
        creator = next(c for c in self._creators if self._identity("creator", c)[0] == op)
        fields, kept = (_Field * len(attributes))(), []
        for field, (name, value) in zip(fields, attributes.items(), strict=True):
            kind, data = value if isinstance(value, tuple) else _typed(value)
            kept.append((name.encode(), np.atleast_1d(data)))
            encoded, data = kept[-1]
            field.name, field.data, field.type, field.length = encoded, data.ctypes.data, FIELD_TYPES[kind], len(data)
        address = self.harness.harness_create(ctypes.c_void_p(creator), fields, len(attributes), int(at_runtime))
        return Plugin(self, address) if address else None


def _typed(value: object) -> tuple[str, np.ndarray]:
    if isinstance(value, (bool, int)):
        value = np.int32(value)
    data = np.atleast_1d(np.float32(value) if isinstance(value, float) else value)
    return _TYPES_OF_FIELDS[data.dtype.type], data


class Plugin:
    """A plugin object, destroyed with this one."""

    def __init__(self, library: Library, address: int) -> None:
        self.library, self._harness, self._address = library, library.harness, ctypes.c_void_p(address)

    def __del__(self) -> None:
        self._harness.harness_destroy(self._address)

    @property
    def identity(self) -> tuple[str, str, str]:
        """Name, version and namespace."""
        return self.library._identity("plugin", self._address.value)

    @property
    def timing_id(self) -> str:
        """Timing cache ID."""
        return self._harness.harness_timing_id(self._address).decode()

    def clone(self) -> Plugin:
        """Clones the plugin."""
        return Plugin(self.library, self._harness.harness_clone(self._address))

    def attach(self) -> Plugin:
        """Attaches the plugin to an execution context."""
        return Plugin(self.library, self._harness.harness_attach(self._address))

    def serialized(self) -> dict[str, np.generic]:
        """Fields that are stored in an engine."""
        fields = (_Field * 16)()
        count = self._harness.harness_serialized(self._address, fields, len(fields))
        kinds = {FIELD_TYPES["int32"]: ctypes.c_int32, FIELD_TYPES["float32"]: ctypes.c_float}
        values = {}
        for field in fields[:count]:
            assert field.length == 1
            kind = kinds[field.type]
            plain = ctypes.cast(field.data, ctypes.POINTER(kind)).contents.value
            values[field.name.decode()] = np.int32(plain) if kind is ctypes.c_int32 else np.float32(plain)
        return values

    def serialized_addresses(self) -> set[int]:
        """Addresses of these fields' values."""
        fields = (_Field * 16)()
        count = self._harness.harness_serialized(self._address, fields, len(fields))
        return {field.data for field in fields[:count]}

    def output_types(self, inputs: Sequence[str]) -> list[str] | None:
        """Output types, or None if the plugin rejects the input types."""
        given = (ctypes.c_int32 * len(inputs))(*(TYPES[name] for name in inputs))
        made = (ctypes.c_int32 * self._harness.harness_num_outputs(self._address))()
        code = self._harness.harness_output_types(self._address, given, len(inputs), made)
        names = {number: name for name, number in TYPES.items()}
        return None if code else [names[number] for number in made]

    def output_shapes(self, inputs: Sequence[Sequence[str | int]]) -> list[tuple[str, ...]] | None:
        """Output shapes in terms of the inputs' dimension names, or None if the plugin rejects the inputs."""
        ranks = (ctypes.c_int32 * len(inputs))(*map(len, inputs))
        flat = [str(name).encode() for shape in inputs for name in shape]
        text = ctypes.create_string_buffer(1024)
        code = self._harness.harness_output_shapes(
            self._address, ranks, (ctypes.c_char_p * len(flat))(*flat), len(inputs), text, ctypes.c_size_t(1024)
        )
        return None if code else [tuple(shape.split()) for shape in text.value.decode().split(",")]

    def supports(self, position: int, tensors: Sequence[tuple[str, str]], num_outputs: int) -> bool:
        """Whether the plugin supports the type and format at a position, given those before it."""
        described = (_Tensor * len(tensors))()
        for tensor, (kind, layout) in zip(described, tensors, strict=True):
            tensor.type, tensor.format = TYPES[kind], FORMATS[layout]
        inputs = len(tensors) - num_outputs
        return bool(self._harness.harness_supports(self._address, position, described, inputs, num_outputs))

    def configure(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> tuple[int, int]:
        """Return code and workspace size in bytes for tensors of at most these sizes."""
        size = ctypes.c_size_t()
        code = self._harness.harness_configure(
            self._address, _tensors([*inputs, *outputs]), len(inputs), len(outputs), ctypes.byref(size)
        )
        return code, size.value

    def run(
        self,
        inputs: Sequence[np.ndarray],
        outputs: Sequence[np.ndarray],
        *,
        formats: Mapping[int, str] | None = None,
        shapes: Mapping[int, tuple[int, ...]] | None = None,
        workspace: np.ndarray | None = None,
        new_shapes: bool = True,
    ) -> int:
        """Runs the plugin; returns the code of the first step that fails, or 0.

        Args:
            formats: formats of non-linear tensors, by position among inputs and outputs.
            shapes: shapes of tensors with another memory layout.
            new_shapes: call onShapeChange first, as a context does after a change.
        """
        described = _tensors([*inputs, *outputs], formats or {}, shapes or {})
        memory = ctypes.c_void_p(workspace.ctypes.data if workspace is not None else None)
        return self._harness.harness_run(
            self._address, described, len(inputs), len(outputs), int(new_shapes), memory, None
        )


def _tensors(
    arrays: Sequence[np.ndarray],
    formats: Mapping[int, str] | None = None,
    shapes: Mapping[int, tuple[int, ...]] | None = None,
):
    described = (_Tensor * len(arrays))()
    for place, (tensor, array) in enumerate(zip(described, arrays, strict=True)):
        assert array.flags.c_contiguous
        shape = (shapes or {}).get(place, array.shape)
        tensor.type = TYPES[kernels_on_cpu.name_of(array)]
        tensor.format = FORMATS[(formats or {}).get(place, "LINEAR")]
        tensor.rank, tensor.dims[: len(shape)], tensor.address = len(shape), shape, array.ctypes.data
    return described
