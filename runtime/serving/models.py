"""Model files on a Triton server: backend, files, and the accepted batches and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from maskrcnn.errors import UserError, check_range
from maskrcnn.files import kind_of
from maskrcnn.metadata import ModelMetadata, not_ours
from maskrcnn.plugins import build
from maskrcnn.plugins.build import Library
from maskrcnn.runtime.backends.tensorrt_library import Hardware, PluginForm, plugin_hash
from maskrcnn.runtime.build.profiles import Profile, from_json
from maskrcnn.runtime.engine_files import check_portable, metadata_path, read_metadata, read_model

_REGISTERING_LIBRARY = "libmaskrcnn_plugins_register.so"  # loads the plugin library from its folder, see plugins/csrc
_MASKS = ("rle", "bits", "none")
_INSTANCE_KINDS = ("auto", "gpu", "cpu")
_NETWORKS = ("native", "python")
PYTHON_PACKAGES = {".onnx": "onnxruntime (or onnxruntime-gpu)", ".xml": "openvino", ".engine": "tensorrt, cuda-python"}
_DEFAULT_MAX_BATCH = 8  # for files that accept any batch; 8 images of 800 × 1333 take some gigabytes

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model file as a Triton server runs it."""

    path: Path
    metadata: ModelMetadata
    backend: str  # name of the Triton backend
    files: dict[str, Path]  # files in a version's folder, by name; the model is the first
    profiles: tuple[Profile, ...] = ()  # of TensorRT engines
    needs: tuple[str, ...] = ()  # requirements on the server, as text
    flags: tuple[str, ...] = ()  # of tritonserver; `{folder}` stands for the version's folder

    @property
    def is_batched_by_triton(self) -> bool:
        """Whether Triton batches requests. Not with its OpenVINO backend, which would fix the batch at the maximum."""
        return self.backend != "openvino"

    @property
    def kind(self) -> str | None:
        """Device: "gpu" for TensorRT engines, "cpu" for OpenVINO engines, None if both work."""
        return {".engine": "gpu", ".xml": "cpu"}.get(self.path.suffix)


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """How models are served."""

    max_batch: int | None = None  # maximum number of images in a batch; None: as the file allows
    instances: int = 1  # number of instances of the network on each GPU, or on the CPU
    step_instances: int = 2  # number of processes of each step before and after the network
    kind: str = "auto"  # where ONNX files run: auto, gpu or cpu
    queue_delay_us: int = 0  # maximum time that a request waits to be batched with others
    pad_to: tuple[Size, ...] = ()  # sizes that images are padded to
    masks: str = "rle"  # format of the masks: rle, bits or none
    min_score: float = 0.0  # detections with a lower score are not sent
    threads: int = 0  # per instance on a CPU; 0: the default of the runtime
    cuda_graphs: bool = True  # run TensorRT engines as CUDA graphs

    def __post_init__(self) -> None:
        for value, allowed, option in ((self.masks, _MASKS, "--masks"), (self.kind, _INSTANCE_KINDS, "--kind")):
            if value not in allowed:
                raise UserError(f"{option} {value}", f"one of {', '.join(allowed)}", "choose one of these")
        for name in ("max_batch", "instances", "step_instances"):
            check_range(name, getattr(self, name), 1)
        check_range("queue_delay", self.queue_delay_us, 0)
        check_range("threads", self.threads, 0)
        check_range("min_score", self.min_score, 0, 1)


def served_model(path: Path, *, plugin_library: Path | None = None, network: str = "native") -> ServedModel:
    """Reads a model file's metadata.

    Args:
        path: ONNX file, TensorRT engine with its JSON, or OpenVINO engine with its weights.
        plugin_library: `libmaskrcnn_plugins.so`, for engines that use it, with the registering library in the same
            folder (default: from the cache).
        network: "native" runs the network in Triton's backend for the file, "python" in maskrcnn's backend inside the
        Python backend.

    Raises:
        UserError: for a file that is missing, not from maskrcnn, or that Triton cannot run correctly.
    """
    if network not in _NETWORKS:
        raise UserError(f"--network {network}", f"one of {', '.join(_NETWORKS)}", "choose one of these")
    suffixes = (".onnx", ".engine", ".xml")
    if path.suffix not in suffixes:
        raise UserError(
            f"{path}: {kind_of(path)}",
            f"one of {', '.join(suffixes)}",
            "to serve a checkpoint, export it: `maskrcnn export CHECKPOINT --onnx`",
        )
    if not path.is_file():
        raise UserError(f"no file {path}", "a model to serve", "correct the path, or run `maskrcnn export --onnx`")
    is_native = network == "native"
    if path.suffix == ".onnx":
        model = _onnx(path)
    elif path.suffix == ".engine":
        model = _tensorrt(path, plugin_library, is_native=is_native)
    else:
        model = _openvino(path, is_native=is_native)
    return model if is_native else _in_python(model)


def _in_python(model: ServedModel) -> ServedModel:
    """Returns the same model for the Python backend (`network.py`)."""
    suffix = model.path.suffix
    files = {f"model{suffix}": model.path}
    if suffix == ".xml":
        files["model.bin"] = model.path.with_suffix(".bin")
    elif suffix == ".engine":
        files["model.engine.json"] = metadata_path(model.path)
    packages = f"in the server's Python: pip install {PYTHON_PACKAGES[suffix]}"
    return replace(model, backend="python", files=files, needs=(*model.needs, packages), flags=())


def _onnx(path: Path) -> ServedModel:
    proto, metadata = read_model(path)
    check_portable(proto, path)
    if metadata.precision == "bf16":
        raise UserError(
            f"{path}: a file in bfloat16, for which ONNX Runtime has no kernels",
            "an ONNX file in another precision, or an engine",
            "export it with --precision fp16, or run `maskrcnn build-engine`",
        )
    return ServedModel(path=path, metadata=metadata, backend="onnxruntime", files={"model.onnx": path})


def _openvino(path: Path, *, is_native: bool) -> ServedModel:
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise UserError(f"no {weights.name} beside {path}", "both files of an OpenVINO engine", "copy both")
    metadata = read_metadata(path)
    stamp = metadata.stamp
    if stamp.get("weights") == "fp32" and is_native:
        # OpenVINO's default is bfloat16 if the CPU supports it, and Triton's backend cannot change that. In engines in
        # single precision, coordinates would then be bfloat16 too.
        raise UserError(
            f"{path}: an engine in single precision, which Triton's OpenVINO backend would run in bfloat16",
            "an engine in half precision or 8-bit integers, or an ONNX file",
            "run it in maskrcnn's backend with --network python, serve its ONNX file, or build with --fp16",
        )
    needs = [f"the CPU that the engine was built for ({stamp.get('cpu', 'unknown')}) or a similar one"]
    if stamp.get("execution") == "bf16":
        needs.append("bfloat16 in the CPU (AVX512-BF16 or AMX)")
    elif is_native:
        needs.append("a CPU without bfloat16, as the one it was built on; for a CPU with it, build the engine there")
    needs.append(f"OpenVINO able to read files from {stamp.get('openvino', 'another version').partition('-')[0]}")
    files = {"model.xml": path, "model.bin": weights}
    return ServedModel(path=path, metadata=metadata, backend="openvino", files=files, needs=tuple(needs))


def _tensorrt(path: Path, plugin_library: Path | None, *, is_native: bool) -> ServedModel:
    metadata = read_metadata(path)
    stamp = metadata.stamp
    if stamp.get("target") != "tensorrt":
        raise not_ours(path, f"an engine for {stamp.get('target', 'an unknown target')}")
    if stamp.get("refit") == "stripped":
        raise UserError(
            f"{path}: an engine without its weights, which Triton would run regardless",
            "an engine with its weights",
            f"add them: `maskrcnn refit-engine {path} MODEL.onnx --output NEW.engine`",
        )
    profiles = tuple(from_json(str(stamp.get("profiles"))))
    flags, files = [], {"model.plan": path}
    is_version_compatible = stamp.get("version_compatible") == "yes"
    if is_version_compatible:
        flags.append("--backend-config=tensorrt,version-compatible=true")
    if stamp.get("plugins") == PluginForm.LIBRARY.value:
        if not is_native:
            raise UserError(
                f"{path}: an engine that calls the plugin library, with --network python",
                "an engine that contains its kernels",
                "build it without --plugin-library, or omit --network python",
            )
        files |= _libraries(stamp, plugin_library)
        flags.append(f"--backend-config=tensorrt,plugins={{folder}}/{_REGISTERING_LIBRARY}")
    capability, version = stamp.get("compute_capability", "unknown"), stamp.get("tensorrt", "unknown")
    gpu = {
        Hardware.AMPERE_PLUS.value: "a GPU of compute capability 8.0 or newer",
        Hardware.SAME_COMPUTE_CAPABILITY.value: f"a GPU of compute capability {capability}",
    }.get(
        stamp.get("hardware_compatibility", Hardware.NONE.value),
        f"the GPU {stamp.get('gpu', 'unknown')} (compute capability {capability})",
    )
    exactly = "exactly: choose the server's version by its release notes"
    needs = [gpu, f"TensorRT {version} or newer" if is_version_compatible else f"TensorRT {version}, {exactly}"]
    limit, largest = largest_batch(profiles), max((profile.batch.max for profile in profiles), default=0)
    if 0 < limit < largest:
        gap = f"as the profiles leave gaps above that (for more: --batch 1:{largest}:{largest})"
        needs.append(f"batches of at most {limit}, {gap}")
    return ServedModel(
        path=path,
        metadata=metadata,
        backend="tensorrt",
        files=files,
        profiles=profiles,
        needs=tuple(needs),
        flags=tuple(flags),
    )


def _libraries(stamp: dict[str, str], given: Path | None) -> dict[str, Path]:
    """The plugin library of an engine and the library that registers it, by name."""
    capability = stamp.get("compute_capability", "").replace(".", "")
    if given is None and stamp.get("plugin_hash") != plugin_hash(PluginForm.LIBRARY):
        raise UserError(
            f"an engine built with plugins from other sources ({stamp.get('plugin_hash', 'unknown')[:12]}…)",
            f"plugins from the present sources ({plugin_hash(PluginForm.LIBRARY)[:12]}…)",
            f"rebuild it: `{stamp.get('command', 'maskrcnn build-engine --fp16 --plugin-library')}`, or pass its "
            "library with --plugin-library",
        )
    arch = int(capability) if capability.isdigit() else None
    library = given or build.find_library(Library.PLUGINS, arch, tensorrt=stamp.get("tensorrt"))
    if library is None or not library.is_file():
        raise UserError(
            f"no plugin library {library or 'in the cache'} for compute capability {stamp.get('compute_capability')}",
            f"{Library.PLUGINS.file_name}, which this engine uses",
            "`maskrcnn build-plugins --form library --arch …`, or pass one with --plugin-library",
        )
    registering = library.with_name(_REGISTERING_LIBRARY)
    if not registering.is_file():
        raise UserError(
            f"no {_REGISTERING_LIBRARY} beside {library}",
            "the library that registers the plugins with TensorRT, as Triton only loads libraries",
            "`maskrcnn build-plugins --form library --force`, or cmake on the sources in plugins/csrc",
        )
    return {Library.PLUGINS.file_name: library, _REGISTERING_LIBRARY: registering}


def largest_batch(profiles: Sequence[Profile]) -> int:
    """Returns the largest n such that every batch from 1 to n fits at every size of a profile; 0 if 1 does not fit.

    Triton joins the requests that are waiting, so a gap between profiles would cause errors.
    """
    limits = []
    for size in {(profile.height, profile.width) for profile in profiles}:
        batches = [profile.batch for profile in profiles if (profile.height, profile.width) == size]
        first_gap = next(n for n in count(1) if not any(n in batch for batch in batches))
        limits.append(first_gap - 1)
    return min(limits, default=0)


def model_names(name: str) -> dict[str, str]:
    """The names of the models in a repository that serve one network, by their part."""
    return {"network": f"{name}_network", "pre": f"{name}_pre", "post": f"{name}_post", "ensemble": name}


def batch_limit(model: ServedModel, options: ServingOptions) -> int:
    """Returns the maximum batch size of the server.

    Raises:
        UserError: if the profiles of an engine do not support `max_batch`, or a single image.
    """
    if not model.profiles:
        return options.max_batch or _DEFAULT_MAX_BATCH
    limit = largest_batch(model.profiles)
    wanted = options.max_batch or max(limit, 1)
    if wanted > limit:
        listed = ", ".join(dict.fromkeys(str(profile.batch) for profile in model.profiles))
        raise UserError(
            f"{model.path}: profiles for batches of {listed}, and a server for batches of 1 to {wanted}",
            "profiles that support every batch from 1 on: a server joins the requests that are waiting",
            f"rebuild the engine with --batch 1:{wanted}:{wanted}" + (f", or use --max-batch {limit}" if limit else ""),
        )
    return wanted


def size_ranges(model: ServedModel, options: ServingOptions) -> list[tuple[int, int, int, int]]:
    """Returns (min height, max height, min width, max width) of the network's inputs; [] allows any size.

    Raises:
        UserError: for sizes to pad to that are not multiples of the divisor, or outside every profile of the engine.
    """
    divisor = model.metadata.preprocessing.divisor
    for height, width in options.pad_to:
        if height % divisor or width % divisor or min(height, width) < 1:
            raise UserError(f"--pad-to {height}x{width}", f"multiples of {divisor}", "for example --pad-to 800x1344")
        if model.profiles and not any(height in p.height and width in p.width for p in model.profiles):
            listed = ", ".join(dict.fromkeys(f"{profile.height}×{profile.width}" for profile in model.profiles))
            raise UserError(f"--pad-to {height}x{width}", f"a size within {listed}", f"choose one for {model.path}")
    if options.pad_to:
        return [(height, height, width, width) for height, width in options.pad_to]
    return sorted({(p.height.min, p.height.max, p.width.min, p.width.max) for p in model.profiles})
