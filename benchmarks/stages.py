"""Where the time of one image goes, stage by stage, in every runtime that runs a model's files.

    python benchmarks/stages.py runs/train-1/model.onnx runs/train-1/model.int8.xml [--size 800x1088] [--repeat 5]

Times inside a model are the runtime's own profile, which costs some per cent itself; shares are what it is for. A
layer belongs to the module that its name begins with; what lies between layers is told apart by its operator. The call
that is timed and the profile run on one and the same provider, the CPU: see `_UNPROFILED` for why no other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from session import size_hw
from workloads import images_of_size

from maskrcnn.errors import UserError, told_to_the_user
from maskrcnn.files import write_json
from maskrcnn.imaging.postprocess import unpack
from maskrcnn.imaging.preprocess import batch_images
from maskrcnn.runtime import Detector
from maskrcnn.runtime.backends.onnxruntime import session_options
from maskrcnn.runtime.backends.onnxruntime_providers import Provider, provider_named

_MODULES = {
    "backbone.body": "backbone",
    "backbone.fpn": "FPN",
    "rpn.head": "RPN head",
    "roi_heads.box": "box head",
    "roi_heads.mask": "mask head",
    "roi_heads.keypoint": "keypoint head",
}
OPERATORS = {
    "roialign": "RoIAlign",
    **dict.fromkeys(("topk", "nonmaxsuppression"), "TopK and NMS"),
}
REST = "everything else"
# ONNX Runtime's providers whose part of its profile says nothing of single layers. It can be compiled so that it asks
# CUDA for the times of kernels (--enable_cuda_profiling), which the packages that pip installs are not.
_UNPROFILED = {
    Provider.CUDA: "says when the host started a layer, not how long the GPU took",
    Provider.TENSORRT: "has whole parts of the model as one node",
}
OUTSIDE = ("resize and pad", "paste and encode")


@dataclass(frozen=True)
class Split:
    """Milliseconds of one image by stage, medians over calls."""

    model: str
    backend: str
    total_ms: float  # of a call, without profile
    stages_ms: dict[str, float]


def stage_of(name: str, operator: str) -> str:
    """The stage of a node of a profile."""
    for prefix, stage in _MODULES.items():
        if prefix in name:
            return stage
    return OPERATORS.get(operator.lower(), REST)


def _check_provider(name: str) -> None:
    """That ONNX Runtime's profile on a provider can be split.

    Raises:
        UserError: where it cannot, and for a name that is none.
    """
    provider = provider_named(name)
    if provider in _UNPROFILED:
        came = f"--provider {name}: ONNX Runtime's profile there {_UNPROFILED[provider]}"
        do = "use --provider cpu; `benchmarks/run.py` tells preprocessing and engine apart on a GPU"
        raise UserError(came, "--provider cpu", do)


def split_of(path: Path, images: Sequence[np.ndarray], repeat: int, provider: str = "cpu") -> Split:
    """The split of one file in its default runtime.

    Args:
        path: an ONNX file or an OpenVINO engine.
        images: uint8 `[H, W, 3]` RGB.
        repeat: measured calls, and as many that are profiled.
        provider: of ONNX Runtime, for all of them.

    Raises:
        UserError: for a file whose runtime gives no profile.
    """
    _check_provider(provider)
    detector = Detector.load(path, **({"provider": provider} if path.suffix == ".onnx" else {}))
    outside: dict[str, list[float]] = {name: [] for name in OUTSIDE}
    totals = []
    for k in range(repeat + 1):
        image = images[k % len(images)]
        began = time.perf_counter()
        pixels, sizes = batch_images([image], detector.metadata.preprocessing)
        prepared = time.perf_counter()
        outputs = detector.backend({"images": pixels, "image_sizes": sizes})
        inferred = time.perf_counter()
        for found in unpack(outputs, sizes, [image.shape[:2]]):
            if found.has_masks:
                found.rles()
        ended = time.perf_counter()
        if k:  # the first call prepares
            totals.append(ended - began)
            for name, seconds in zip(OUTSIDE, (prepared - began, ended - inferred), strict=True):
                outside[name].append(seconds)
    feeds = {"images": pixels, "image_sizes": sizes}
    profiles = list(_profiles(path, detector, feeds, repeat))
    stages = {name: 1e3 * statistics.median(values) for name, values in outside.items()}
    for stage in (*_MODULES.values(), *dict.fromkeys(OPERATORS.values()), REST):
        if any(profile[stage] for profile in profiles):  # a model has one of the last two heads, or both, or none
            stages[stage] = statistics.median(profile[stage] for profile in profiles)
    return Split(
        path.name, f"{detector.backend.name} {detector.backend.precision}", 1e3 * statistics.median(totals), stages
    )


def _profiles(path: Path, detector: Detector, feeds: dict[str, np.ndarray], repeat: int) -> Iterable[Counter[str]]:
    """Milliseconds by stage, of each of `repeat` calls."""
    if detector.backend.name.startswith("ONNX Runtime"):
        return _onnxruntime_profiles(path, feeds, repeat, detector.backend.session.get_providers())
    if detector.backend.name == "OpenVINO":
        return _openvino_profiles(detector, feeds, repeat)
    raise UserError(
        f"{path}: {detector.backend.name} gives no profile", "an ONNX file or an engine", "name one of those"
    )


def _onnxruntime_profiles(
    path: Path, feeds: dict[str, np.ndarray], repeat: int, providers: Sequence[str]
) -> Iterable[Counter[str]]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = session_options()
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        for _ in range(repeat + 1):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs: list[Counter[str]] = []
    layers = _layers_by_value(path)
    for event in sorted((e for e in events if e.get("cat") in ("Session", "Node")), key=lambda e: e["ts"]):
        if event["name"] == "model_run":
            runs.append(Counter())
        elif event["name"].endswith("_kernel_time") and runs:
            name = event["name"].removesuffix("_kernel_time").removesuffix("_nchwc")
            name = layers.get(name) or name
            runs[-1][stage_of(name, event["args"].get("op_name", ""))] += event["dur"] / 1e3
    return runs[1:]


def _layers_by_value(path: Path) -> dict[str, str]:
    """The layer that made each value, itself or through what ONNX Runtime fuses with it and names after its output."""
    import onnx

    layers: dict[str, str] = {}
    for node in onnx.load(path).graph.node:
        if node.name.startswith(tuple(_MODULES)):
            layers[node.output[0]] = node.name
        elif node.op_type in ("Relu", "Add"):
            layers[node.output[0]] = layers.get(node.input[0], "")
    return layers


def _openvino_profiles(detector: Detector, feeds: dict[str, np.ndarray], repeat: int) -> Iterable[Counter[str]]:
    request = detector.backend.profiling_request()
    runs = []
    for _ in range(repeat + 1):
        request.infer(feeds, share_inputs=True)
        runs.append(Counter())
        for layer in request.profiling_info:
            milliseconds = 1e3 * layer.real_time.total_seconds()
            runs[-1][stage_of(layer.node_name, layer.node_type)] += milliseconds
    return runs[1:]


def table(splits: Sequence[Split]) -> str:
    """One column for each file: milliseconds and their share of all stages."""
    head = ["stage", *(f"{split.model}, {split.backend}" for split in splits)]
    lines = [head, ["---"] * len(head)]
    found = [stage for split in splits for stage in split.stages_ms]
    known = [stage for stage in (*OUTSIDE, *_MODULES.values(), *OPERATORS.values(), REST) if stage in found]
    for stage in dict.fromkeys([*known, *found]):
        cells = []
        for split in splits:
            ms = split.stages_ms.get(stage, 0.0)
            cells.append(f"{ms:.1f} ms, {ms / sum(split.stages_ms.values()):.0%}")
        lines.append([stage, *cells])
    lines.append(["a call, without profile", *(f"{split.total_ms:.0f} ms" for split in splits)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> list[Split]:
    """Prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="+", help="ONNX files and OpenVINO engines")
    parser.add_argument("--size", type=size_hw, default=(800, 1088), help="of the images, as 800x1088")
    parser.add_argument("--data", type=Path, help="dataset to take images from; default: drawn shapes")
    parser.add_argument("--split", default="val", help="split of --data")
    parser.add_argument("--repeat", type=int, choices=range(1, 101), metavar="CALLS", default=5)
    parser.add_argument("--provider", default="cpu", help="of ONNX Runtime; cpu is the only one that can be split")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    _check_provider(given.provider)
    images, kind = images_of_size(given.size, given.data, given.split)
    splits = [split_of(path, images, given.repeat, given.provider) for path in given.model]
    print(f"{kind} of {given.size[0]}×{given.size[1]}, batch 1, median of {given.repeat}\n\n{table(splits)}")
    if given.json:
        write_json(given.json, [split.__dict__ for split in splits])
    return splits


if __name__ == "__main__":
    with told_to_the_user():
        main()
