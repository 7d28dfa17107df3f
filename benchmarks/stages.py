"""Time per stage of the detector for one image, from the profiles of ONNX Runtime and OpenVINO.

    python benchmarks/stages.py runs/train-1/model.onnx runs/train-1/model.int8.xml [--size 800x1088] [--repeat 5]

Profiling itself costs a few per cent; the shares are meaningful, not the sum. A layer belongs to the module its name
starts with; operations between layers are classified by operator. The timed call and the profile both run on ONNX
Runtime's CPU provider: see `_UNPROFILED` for the others.
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

from maskrcnn.errors import UserError, report_errors
from maskrcnn.files import Output, check_outputs, write_json
from maskrcnn.imaging.postprocess import unpack
from maskrcnn.imaging.preprocess import batch_images
from maskrcnn.runtime.backends.onnxruntime import session_options
from maskrcnn.runtime.backends.onnxruntime_providers import Provider, provider_named
from maskrcnn.runtime.detector import Detector

_MODULES = {
    "backbone.body": "backbone",
    "backbone.fpn": "FPN",
    "rpn.head": "RPN head",
    "roi_heads.box": "box head",
    "roi_heads.mask": "mask head",
    "roi_heads.keypoint": "keypoint head",
}
_OPERATORS = {
    "roialign": "RoIAlign",
    **dict.fromkeys(("topk", "nonmaxsuppression"), "TopK and NMS"),
}
REST = "everything else"
# ONNX Runtime's providers without times of single layers in its profile. Kernel times of CUDA need a build with
# --enable_cuda_profiling, which the packages of pip are not.
_UNPROFILED = {
    Provider.CUDA: "contains when the host started a layer, not how long the GPU took",
    Provider.TENSORRT: "contains large parts of the model as one node",
}
OUTSIDE = ("resize and pad", "paste and encode")


@dataclass(frozen=True)
class Split:
    """Milliseconds per stage for one image, medians over calls."""

    model: str
    backend: str
    total_ms: float  # of a call without profiling
    stages_ms: dict[str, float]


def stage_of(name: str, operator: str) -> str:
    """Return the stage of a node of a profile."""
    for prefix, stage in _MODULES.items():
        if prefix in name:
            return stage
    return _OPERATORS.get(operator.lower(), REST)


def _check_provider(name: str) -> None:
    """Refuse providers whose profile has no stages, and unknown ones."""
    provider = provider_named(name)
    if provider in _UNPROFILED:
        found = f"--provider {name}: ONNX Runtime's profile there {_UNPROFILED[provider]}"
        fix = "use --provider cpu; `benchmarks/run.py` separates preprocessing and engine on a GPU"
        raise UserError(found, "--provider cpu", fix)


def split_of(path: Path, images: Sequence[np.ndarray], repeat: int, provider: str = "cpu") -> Split:
    """Measure one file in its default runtime.

    Args:
        path: ONNX file or OpenVINO engine.
        images: uint8 `[H, W, 3]` RGB.
        repeat: number of timed calls, and of profiled calls.
        provider: execution provider of ONNX Runtime.

    Raises:
        UserError: if the runtime of the file has no profile.
    """
    _check_provider(provider)
    detector = Detector.load(path, **({"provider": provider} if path.suffix == ".onnx" else {}))
    outside: dict[str, list[float]] = {name: [] for name in OUTSIDE}
    totals = []
    for k in range(repeat + 1):
        image = images[k % len(images)]
        start = time.perf_counter()
        pixels, sizes = batch_images([image], detector.metadata.preprocessing)
        prepared = time.perf_counter()
        outputs = detector.backend({"images": pixels, "image_sizes": sizes})
        inferred = time.perf_counter()
        for found in unpack(outputs, sizes, [image.shape[:2]]):
            if found.has_masks:
                found.rles()
        ended = time.perf_counter()
        if k:  # the first call is warm-up
            totals.append(ended - start)
            for name, seconds in zip(OUTSIDE, (prepared - start, ended - inferred), strict=True):
                outside[name].append(seconds)
    feeds = {"images": pixels, "image_sizes": sizes}
    profiles = list(_profiles(path, detector, feeds, repeat))
    stages = {name: 1e3 * statistics.median(values) for name, values in outside.items()}
    for stage in (*_MODULES.values(), *dict.fromkeys(_OPERATORS.values()), REST):
        if any(profile[stage] for profile in profiles):  # models differ in their heads
            stages[stage] = statistics.median(profile[stage] for profile in profiles)
    return Split(
        path.name, f"{detector.backend.name} {detector.backend.precision}", 1e3 * statistics.median(totals), stages
    )


def _profiles(path: Path, detector: Detector, feeds: dict[str, np.ndarray], repeat: int) -> Iterable[Counter[str]]:
    """Milliseconds by stage, for each of `repeat` calls."""
    if detector.backend.name.startswith("ONNX Runtime"):
        return _onnxruntime_profiles(path, feeds, repeat, detector.backend.session.get_providers())
    if detector.backend.name == "OpenVINO":
        return _openvino_profiles(detector, feeds, repeat)
    raise UserError(f"{path}: {detector.backend.name} has no profile", "an ONNX file or an engine", "pass one of these")


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
    """The layer of each value; ONNX Runtime names a fused node after the output of the node that it fuses last."""
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
    """Format a table with a column per file: milliseconds and their share of all stages."""
    head = ["stage", *(f"{split.model}, {split.backend}" for split in splits)]
    lines = [head, ["---"] * len(head)]
    found = [stage for split in splits for stage in split.stages_ms]
    known = [stage for stage in (*OUTSIDE, *_MODULES.values(), *_OPERATORS.values(), REST) if stage in found]
    for stage in dict.fromkeys([*known, *found]):
        cells = []
        for split in splits:
            ms = split.stages_ms.get(stage, 0.0)
            cells.append(f"{ms:.1f} ms, {ms / sum(split.stages_ms.values()):.0%}")
        lines.append([stage, *cells])
    lines.append(["a call, without profile", *(f"{split.total_ms:.0f} ms" for split in splits)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> list[Split]:
    """Measure, print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="+", help="ONNX files and OpenVINO engines")
    parser.add_argument("--size", type=size_hw, default=(800, 1088), help="image size; default: 800x1088")
    parser.add_argument("--data", type=Path, help="COCO-format dataset of the images; default: generated shapes")
    parser.add_argument("--split", default="val", help="split of --data; default: val")
    parser.add_argument(
        "--repeat", type=int, choices=range(1, 101), metavar="CALLS", default=5, help="timed calls; default: 5"
    )
    parser.add_argument("--provider", default="cpu", help="provider of ONNX Runtime; only cpu has profiles by layer")
    parser.add_argument("--json", type=Path, help="JSON file for the results")
    given = parser.parse_args(arguments)
    _check_provider(given.provider)
    check_outputs([Output("--json", given.json, None)] if given.json else [], [*given.model, given.data])
    images, kind = images_of_size(given.size, given.data, given.split)
    splits = [split_of(path, images, given.repeat, given.provider) for path in given.model]
    print(f"{kind} of {given.size[0]}×{given.size[1]}, batch 1, median of {given.repeat}\n\n{table(splits)}")
    if given.json:
        write_json(given.json, [split.__dict__ for split in splits])
    return splits


if __name__ == "__main__":
    with report_errors():
        main()
