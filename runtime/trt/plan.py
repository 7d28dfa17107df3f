"""Loading a TensorRT engine: its two files, the stamp, what its plugins need, and the tensors that it has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.metadata import ModelMetadata, not_ours
from maskrcnn.runtime.backend import TensorSpec, detector_specs
from maskrcnn.runtime.device.memory import Cuda
from maskrcnn.runtime.trt import profiles as tensorrt_profiles
from maskrcnn.runtime.trt.library import PluginForm, Weights, check_stamp, import_tensorrt, load_plugins
from maskrcnn.runtime.trt.log import Log, listen
from maskrcnn.runtime.trt.messages import failure
from maskrcnn.runtime.trt.profiles import Profile
from maskrcnn.runtime.verification.staged_graph import PREFIX

REBUILD = "maskrcnn build-engine --fp16 --target tensorrt"
_DTYPES = {  # TensorRT's types, and NumPy's
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
}


@dataclass(frozen=True)
class LoadedPlan:
    """An engine in a GPU's memory, ready for execution contexts."""

    cuda: Cuda
    trt: Any  # the tensorrt module
    log: Log  # what TensorRT says since this was loaded
    runtime: Any  # which lives as long as the engine
    engine: Any
    metadata: ModelMetadata
    profiles: tuple[Profile, ...]
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    def failure(self, what: str) -> UserError:
        """The error for something that TensorRT refused to do, by what it said."""
        return failure(self.log.take(), what, "an engine that runs")

    def choose(self, shape: tuple[int, int, int]) -> int:
        """The profile for so many images of this height and width; see `profiles.choose`."""
        return tensorrt_profiles.choose(self.profiles, shape, rebuild=self._rebuild)

    def roomy_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """What to pad a batch to; see `profiles.roomy_shape`."""
        return tensorrt_profiles.roomy_shape(self.profiles, shape, rebuild=self._rebuild)

    @property
    def _rebuild(self) -> str:
        return str(self.metadata.stamp.get("command") or REBUILD)


def metadata_path(path: Path) -> Path:
    """The second file of an engine: `model.engine.json` of `model.engine`."""
    return path.with_name(f"{path.name}.json")


def load_plan(path: Path, device: int) -> LoadedPlan:
    """The engine of a file, on the GPU of this number.

    Raises:
        UserError: where a file is missing or not ours, TensorRT or the GPU is missing, the stamp names another machine,
            weights or a plugin library are not there, or TensorRT refuses the plan.
    """
    metadata, plan = read_engine(path)
    trt = import_tensorrt()
    cuda = Cuda(device)
    if error := check_stamp(metadata, trt=trt, gpu=cuda.name, compute_capability=cuda.compute_capability):
        raise UserError(f"{path}: {error.came}", error.expected, error.do)
    if metadata.stamp.get("plugins") == PluginForm.LIBRARY.value:  # ahead-of-time plugins are in the engine
        major, minor = cuda.compute_capability
        load_plugins(trt, PluginForm.LIBRARY, arch=10 * major + minor)
    log = listen(trt)
    with cuda.active():
        runtime = trt.Runtime(log.logger)
        if metadata.stamp.get("version_compatible") == "yes":
            runtime.engine_host_code_allowed = True  # such a plan holds a runtime of the version it was built with
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise failure(log.messages, f"{path}: TensorRT loads no engine from it", f"a plan of `{REBUILD}`")
    inputs, outputs = _tensors(trt, engine, path)
    _check_contract(inputs, outputs, metadata, path)
    profiles = tensorrt_profiles.from_json(str(metadata.stamp.get("profiles")))
    if len(profiles) != engine.num_optimization_profiles:
        raise not_ours(
            path, f"{engine.num_optimization_profiles} profiles, and {len(profiles)} in its {path.name}.json"
        )
    return LoadedPlan(cuda, trt, log, runtime, engine, metadata, tuple(profiles), inputs, outputs)


def read_engine(path: Path) -> tuple[ModelMetadata, bytes]:
    """Both files of an engine: its metadata and the plan.

    Raises:
        UserError: where one is missing, the plan holds no weights, or the stamp was written for another plan.
    """
    missing = [each.name for each in (path, metadata_path(path)) if not each.is_file()]
    if missing:
        raise UserError(
            f"no file {' and '.join(missing)} in {path.parent}",
            f"both files of a TensorRT engine, {path.name} and {metadata_path(path).name}",
            f"check the path, or build it: `{REBUILD}`",
        )
    metadata, plan = ModelMetadata.from_json(metadata_path(path).read_text(encoding="utf-8"), path), path.read_bytes()
    if metadata.stamp.get("refit") == Weights.STRIPPED.value:
        came, expected = f"{path}: an engine without its weights", "one that has got them"
        raise UserError(came, expected, f"put them in: `maskrcnn refit-engine {path.name} MODEL.onnx`")
    if metadata.stamp.get("plan_sha256", (found := hashlib.sha256(plan).hexdigest())) != found:
        raise not_ours(path, f"another plan than the one that {metadata_path(path).name} was written for")
    return metadata, plan


def _tensors(trt: Any, engine: Any, path: Path) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Inputs and outputs by name; a length that depends on the profile is None."""
    inputs: dict[str, TensorSpec] = {}
    outputs: dict[str, TensorSpec] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise not_ours(path, f"a tensor {name} of type {kind}")
        shape = tuple(None if length < 0 else int(length) for length in engine.get_tensor_shape(name))
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        (inputs if is_input else outputs)[name] = TensorSpec(_DTYPES[kind], shape)
    return inputs, outputs


def _check_contract(
    inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec], metadata: ModelMetadata, path: Path
) -> None:
    """Refuses a plan whose tensors are not the detector's: its .json belongs to another file."""
    wanted_inputs, wanted_outputs = detector_specs(metadata)
    wanted = {**wanted_inputs, **wanted_outputs}
    # An engine that was built to look into it has its stages as further outputs.
    found = {name: spec for name, spec in {**inputs, **outputs}.items() if not name.startswith(PREFIX)}
    differing = {name for name in wanted.keys() | found.keys() if not _agree(found.get(name), wanted.get(name))}
    if differing:
        raise not_ours(path, f"{', '.join(sorted(differing))} other than {metadata_path(path).name} says")


def _agree(found: TensorSpec | None, wanted: TensorSpec | None) -> bool:
    """Whether a tensor is as the contract has it; where one of them leaves a length open, any is right."""
    if found is None or wanted is None or found.dtype != wanted.dtype or len(found.shape) != len(wanted.shape):
        return False
    return all(None in pair or pair[0] == pair[1] for pair in zip(found.shape, wanted.shape, strict=True))
