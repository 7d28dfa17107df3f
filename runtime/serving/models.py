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
from maskrcnn.runtime.onnx_file import check_portable, read_model
from maskrcnn.runtime.openvino_file import metadata_of_xml
from maskrcnn.runtime.trt.library import Hardware, PluginForm, plugin_hash
from maskrcnn.runtime.trt.plan import metadata_path
from maskrcnn.runtime.trt.profiles import Profile, from_json

KINDS = (".onnx", ".engine", ".xml")
REGISTERING_LIBRARY = "libmaskrcnn_plugins_register.so"  # loads the plugins that lie beside it, see plugins/csrc


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
        flags.append(f"--backend-config=tensorrt,plugins={{folder}}/{REGISTERING_LIBRARY}")
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
    registering = library.with_name(REGISTERING_LIBRARY)
    if not registering.is_file():
        raise UserError(
            f"no {REGISTERING_LIBRARY} beside {library}",
            "the library that puts the plugins into TensorRT's registry: Triton only loads libraries",
            "`maskrcnn build-plugins --form library --force`, or cmake on the sources in plugins/csrc",
        )
    return {Library.PLUGINS.file_name: library, REGISTERING_LIBRARY: registering}


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
