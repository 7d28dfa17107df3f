"""What a model file needs on a Triton server: its backend, its files, the batches and sizes that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from maskrcnn.errors import UserError
from maskrcnn.metadata import ModelMetadata, not_ours
from maskrcnn.plugins import build
from maskrcnn.plugins.build import Library
from maskrcnn.runtime.backends.tensorrt_engine import metadata_path
from maskrcnn.runtime.backends.tensorrt_library import Hardware, PluginForm, plugin_hash
from maskrcnn.runtime.build.profiles import Profile, from_json
from maskrcnn.runtime.engine_files import metadata_of_xml
from maskrcnn.runtime.onnx_file import check_portable, read_model

KINDS = (".onnx", ".engine", ".xml")
_REGISTERING_LIBRARY = "libmaskrcnn_plugins_register.so"  # loads the plugins that lie beside it, see plugins/csrc


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model file, as a Triton server runs it."""

    path: Path
    metadata: ModelMetadata
    backend: str  # Triton's name of it
    files: dict[str, Path]  # what lies in a version's folder, by name there; the model itself first
    profiles: tuple[Profile, ...] = ()  # of TensorRT engines
    needs: tuple[str, ...] = ()  # sentences on the server, for whoever starts it
    flags: tuple[str, ...] = ()  # for tritonserver; `{folder}` stands for the version's folder

    @property
    def is_batched_by_triton(self) -> bool:
        """Whether the server may join requests; its OpenVINO backend would fix the batch at the largest one."""
        return self.backend != "openvino"


def read_served(path: Path, *, plugin_library: Path | None = None) -> Served:
    """Looks into a model file.

    Args:
        path: an ONNX file, a TensorRT engine with its JSON, or an OpenVINO engine with its weights.
        plugin_library: `libmaskrcnn_plugins.so`, for engines that call it, with the registering library beside it; by
            default those of the cache.

    Raises:
        UserError: for a file that is missing, not ours, or nothing that Triton runs rightly.
    """
    readers = {".onnx": _onnx, ".engine": lambda path: _engine(path, plugin_library), ".xml": _openvino}
    if path.suffix not in readers:
        raise UserError(
            f"{path}: a file of kind {path.suffix!r}",
            f"one of {', '.join(KINDS)}",
            "a checkpoint is exported first: `maskrcnn export CHECKPOINT --onnx`",
        )
    if not path.is_file():
        raise UserError(f"no file {path}", "a model to serve", "check the path, or run `maskrcnn export --onnx`")
    return readers[path.suffix](path)


def _onnx(path: Path) -> Served:
    proto, metadata = read_model(path)
    check_portable(proto, path)
    if metadata.precision == "bf16":
        raise UserError(
            f"{path}: a file in bfloat16, for which ONNX Runtime has no kernels",
            "an ONNX file in another precision, or an engine",
            "export it with --precision fp16, or run `maskrcnn build-engine`",
        )
    return Served(path=path, metadata=metadata, backend="onnxruntime", files={"model.onnx": path})


# OpenVINO


def _openvino(path: Path) -> Served:
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise UserError(f"no {weights.name} beside {path}", "both files of an OpenVINO engine", "copy both")
    metadata = metadata_of_xml(path)
    stamp = metadata.stamp
    if stamp.get("weights") == "fp32":
        # Without a wish OpenVINO executes in bfloat16 where it can, and Triton's backend cannot ask for anything else;
        # an engine in single precision does not keep its coordinates from that.
        raise UserError(
            f"{path}: an engine in single precision, which Triton's OpenVINO backend would run in bfloat16",
            "an engine in half precision or 8-bit integers, or an ONNX file",
            "serve the ONNX file that it was built from, or build with --fp16",
        )
    needs = [f"the CPU that the engine was built for ({stamp.get('cpu', 'unknown')}) or a like one"]
    if stamp.get("execution") == "bf16":
        needs.append("bfloat16 in the CPU (AVX512-BF16 or AMX)")
    else:
        needs.append("a CPU without bfloat16, as that which it was built on; on one with it build the engine anew")
    needs.append(f"an OpenVINO that reads files of {stamp.get('openvino', 'another version').partition('-')[0]}")
    files = {"model.xml": path, "model.bin": weights}
    return Served(path=path, metadata=metadata, backend="openvino", files=files, needs=tuple(needs))


# TensorRT


def _engine(path: Path, plugin_library: Path | None) -> Served:
    beside = metadata_path(path)
    if not beside.is_file():
        raise UserError(f"no {beside.name} beside {path}", "both files of a TensorRT engine", "copy both")
    metadata = ModelMetadata.from_json(beside.read_text(encoding="utf-8"), beside)
    stamp = metadata.stamp
    if stamp.get("target") != "tensorrt":
        raise not_ours(path, f"an engine for {stamp.get('target', 'an unknown target')}")
    if stamp.get("refit") == "stripped":
        raise UserError(
            f"{path}: an engine without its weights, which Triton would run as it is",
            "one that has got them",
            f"put them in: `maskrcnn refit-engine {path} MODEL.onnx --output NEW.engine`",
        )
    profiles = tuple(from_json(str(stamp.get("profiles"))))
    flags, files = [], {"model.plan": path}
    if stamp.get("version_compatible") == "yes":
        flags.append("--backend-config=tensorrt,version-compatible=true")
    if stamp.get("plugins") == PluginForm.LIBRARY.value:
        files |= _libraries(stamp, plugin_library)
        flags.append(f"--backend-config=tensorrt,plugins={{folder}}/{_REGISTERING_LIBRARY}")
    return Served(
        path=path,
        metadata=metadata,
        backend="tensorrt",
        files=files,
        profiles=profiles,
        needs=(*_engine_needs(stamp), *_batch_limits(profiles)),
        flags=tuple(flags),
    )


def _engine_needs(stamp: dict[str, str]) -> list[str]:
    capability = stamp.get("compute_capability", "unknown")
    level, version = stamp.get("hardware_compatibility", Hardware.NONE.value), stamp.get("tensorrt", "unknown")
    gpu = {
        Hardware.AMPERE_PLUS.value: "a GPU of compute capability 8.0 or newer",
        Hardware.SAME_COMPUTE_CAPABILITY.value: f"a GPU of compute capability {capability}",
    }.get(level, f"the GPU {stamp.get('gpu', 'unknown')} (compute capability {capability})")
    if stamp.get("version_compatible") == "yes":
        return [gpu, f"TensorRT {version} or newer"]
    return [gpu, f"TensorRT {version}, exactly: choose the server's version by its release notes"]


def _batch_limits(profiles: Sequence[Profile]) -> list[str]:
    least, most = largest_batch(profiles), max((profile.batch.greatest for profile in profiles), default=0)
    if not 0 < least < most:
        return []
    return [f"batches of at most {least}, as profiles leave gaps after that (for more: --batch 1:{most}:{most})"]


def _libraries(stamp: dict[str, str], given: Path | None) -> dict[str, Path]:
    """The plugin library that an engine calls, and the one that registers it, by name."""
    capability = stamp.get("compute_capability", "").replace(".", "")
    if given is None and stamp.get("plugin_hash") != plugin_hash(PluginForm.LIBRARY):
        raise UserError(
            f"an engine built with plugins of other sources ({stamp.get('plugin_hash', 'unknown')[:12]}…)",
            f"the sources here ({plugin_hash(PluginForm.LIBRARY)[:12]}…)",
            f"rebuild it: `{stamp.get('command', 'maskrcnn build-engine --fp16 --plugin-library')}`, or name its "
            "library with --plugin-library",
        )
    arch = int(capability) if capability.isdigit() else None
    library = given or build.find_library(Library.PLUGINS, arch, tensorrt=stamp.get("tensorrt"))
    if library is None or not library.is_file():
        raise UserError(
            f"no plugin library {library or 'in the cache'} for compute capability {stamp.get('compute_capability')}",
            f"{Library.PLUGINS.file_name}, which this engine calls",
            "`maskrcnn build-plugins --form library --arch …`, or name one with --plugin-library",
        )
    registering = library.with_name(_REGISTERING_LIBRARY)
    if not registering.is_file():
        raise UserError(
            f"no {_REGISTERING_LIBRARY} beside {library}",
            "the library that puts the plugins into TensorRT's registry: Triton only loads libraries",
            "`maskrcnn build-plugins --form library --force`, or cmake on the sources in plugins/csrc",
        )
    return {Library.PLUGINS.file_name: library, _REGISTERING_LIBRARY: registering}


def largest_batch(profiles: Sequence[Profile]) -> int:
    """The largest n so that every batch from 1 to n fits, at every size that some profile takes; 0 where 1 does not.

    Triton joins whatever requests are waiting, so gaps between profiles would be errors.
    """
    limits = []
    for size in {(profile.height, profile.width) for profile in profiles}:
        own = [profile.batch for profile in profiles if (profile.height, profile.width) == size]
        first_gap = next(n for n in count(1) if not any(n in batch for batch in own))
        limits.append(first_gap - 1)
    return min(limits, default=0)


# How models are to be served, and what their files allow of it.

_MASKS = ("rle", "bits", "none")
_INSTANCE_KINDS = ("auto", "gpu", "cpu")
_LARGEST_BATCH = 8  # of files that take any; a batch of images of 800 × 1333 then needs some gigabytes

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What one may choose."""

    max_batch: int | None = None  # images in a batch; by default what the file allows
    instances: int = 1  # of the network, on each GPU
    step_instances: int = 2  # processes of each step around it
    kind: str = "auto"  # where ONNX files run, of INSTANCE_KINDS
    queue_delay_us: int = 0  # a request waits so long for others to be batched with
    pad_to: tuple[Size, ...] = ()  # heights and widths that images are padded to
    masks: str = "rle"  # how clients get masks, of MASKS
    min_score: float = 0.0  # detections below it are not sent
    threads: int = 0  # of each instance on a CPU; 0 leaves the choice to the runtime
    has_cuda_graphs: bool = True  # whether TensorRT engines run as CUDA graphs

    def __post_init__(self) -> None:
        for value, allowed, option in ((self.masks, _MASKS, "--masks"), (self.kind, _INSTANCE_KINDS, "--kind")):
            if value not in allowed:
                raise UserError(f"{option} {value}", f"one of {', '.join(allowed)}", "choose one of these")


def names_of(name: str) -> dict[str, str]:
    """The models of a repository that serve one network: by their part, their names."""
    return {"network": f"{name}_network", "pre": f"{name}_pre", "post": f"{name}_post", "ensemble": name}


def batch_limit(served: Served, serving: Serving) -> int:
    """The largest batch that the server makes.

    Raises:
        UserError: where an engine's profiles do not allow what is asked, or no single image.
    """
    if not served.profiles:
        return serving.max_batch or _LARGEST_BATCH
    limit = largest_batch(served.profiles)
    wanted = serving.max_batch or max(limit, 1)
    if wanted > limit:
        listed = ", ".join(dict.fromkeys(str(profile.batch) for profile in served.profiles))
        raise UserError(
            f"{served.path}: profiles for batches of {listed}, and a server for batches of 1 to {wanted}",
            "profiles that take every batch from 1 on: a server joins whatever requests are waiting",
            f"rebuild the engine with --batch 1:{wanted}:{wanted}" + (f", or use --max-batch {limit}" if limit else ""),
        )
    return wanted


def sizes(served: Served, serving: Serving) -> list[tuple[int, int, int, int]]:
    """Least and largest height, least and largest width of what the network gets; none: any multiples of the divisor.

    Raises:
        UserError: for sizes to pad to that are no multiples of the divisor or lie in no profile of the engine.
    """
    divisor = served.metadata.preprocessing.divisor
    for height, width in serving.pad_to:
        if height % divisor or width % divisor or min(height, width) < 1:
            raise UserError(f"--pad-to {height}x{width}", f"multiples of {divisor}", "for example --pad-to 800x1344")
        if served.profiles and not any(height in p.height and width in p.width for p in served.profiles):
            listed = ", ".join(dict.fromkeys(f"{profile.height}×{profile.width}" for profile in served.profiles))
            raise UserError(f"--pad-to {height}x{width}", f"a size within {listed}", f"choose one for {served.path}")
    if serving.pad_to:
        return [(height, height, width, width) for height, width in serving.pad_to]
    return sorted({(p.height.least, p.height.greatest, p.width.least, p.width.greatest) for p in served.profiles})
