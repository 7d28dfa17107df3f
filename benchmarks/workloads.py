"""Workloads of `benchmarks/run.py`: images, and for the ResNet-50 workload the files of a model with random weights.

The files are exported, cast, quantised and built through the Python API, as the commands do it. A file that cannot be
made affects its own rows only, which show the reason. A file that was rejected because its detections differ from the
ONNX file's is measured all the same: with random weights this is expected, and the benchmark marks it as inexact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from contenders import Artefacts, Contender, unavailable
from peers import calibrated_state_dict
from PIL import Image
from session import Progress

from maskrcnn import runs
from maskrcnn.api.build_engine import build_engine
from maskrcnn.api.export import export
from maskrcnn.config import model_config
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.images import read_image
from maskrcnn.data.layouts import find_split
from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing, resize_bilinear, resized_size
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime.backends.tensorrt_library import tensorrt_obstacle
from maskrcnn.runtime.build.openvino import build_openvino_engine
from maskrcnn.runtime.detector import Detector
from maskrcnn.weights.checkpoint import SUFFIX, load_weights, save_checkpoint

_POOL = 8  # distinct images that are timed; libraries' caches hold this many input shapes
_GENERATED_SIZE_HW = (128, 128)
_RESNET50 = "maskrcnn_resnet50_fpn"
_CLASSES = 91  # COCO's, with background
_RANDOM_WEIGHTS = (
    "random weights: detections are compared; an AP would be meaningless",
    "random weights give neighbouring boxes similar scores, and half precision keeps other boxes: only the AP of a "
    "trained model shows the cost in accuracy",
)
# The second file of an engine. It is moved first: an .xml without its .bin would be incomplete.
_SECOND_FILES = {
    ".xml": lambda path: path.with_suffix(".bin"),
    ".engine": lambda path: path.with_name(f"{path.name}.json"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """The images of a benchmark, and how often they are timed."""

    name: str
    pools: dict[str, list[np.ndarray]]  # timed images by size, such as 800×1088; "": the dataset's own sizes
    batches: tuple[int, ...]
    repeat: int
    dataset: CocoDataset | None  # for AP
    budget_s: float | None = None  # for timing one batch size, see `time_in_turns`
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()  # files of the images in the pool ""

    def batch(self, size: str, count: int, turn: int) -> list[np.ndarray]:
        """Return the images of a call; in the same turn they are the same for every contender."""
        pool = self.pools[size]
        return [pool[(turn * count + k) % len(pool)] for k in range(count)]

    def files_of_batch(self, size: str, count: int) -> list[Path]:
        """Return the files of the images of turn 0, if they were read unchanged."""
        return [self.files[k % len(self.files)] for k in range(count)] if self.files and not size else []


def size_name(size_hw: tuple[int, int]) -> str:
    """Format a size for tables."""
    return f"{size_hw[0]}×{size_hw[1]}"


def set_input_size(detector: Any, size: str) -> None:
    """Disable a detector's or peer's resizing for images of one size; "" keeps its own resizing."""
    if not size:
        return
    height, width = (int(side) for side in size.split("×"))
    if not isinstance(detector, Detector):
        detector.set_input_size((height, width))
        return
    metadata = detector.backend.metadata
    sizes = {"min_size_px": min(height, width), "max_size_px": max(height, width)}
    detector.backend.metadata = replace(metadata, preprocessing=replace(metadata.preprocessing, **sizes))


def dataset_workload(
    artefacts: Artefacts,
    *,
    data: Path | None,
    split: str | None,
    sizes_hw: Sequence[tuple[int, int]] = (),
    batches: tuple[int, ...],
    repeat: int,
    budget_s: float | None,
    images: int | None,
) -> Workload:
    """Return a workload of the given dataset, else of the run's validation dataset, else of generated images.

    With `sizes_hw` the images are fitted into each of these sizes and no AP is measured: a model's AP is that of its
    own resizing.
    """
    found, no_ap = _known_split(artefacts, data, split)
    no_ap = "no AP: the images have the sizes of --size; omit it to measure AP" if sizes_hw else no_ap
    timing = {"batches": batches, "repeat": repeat, "budget_s": budget_s, "notes": (no_ap,) if no_ap else ()}
    if found is None:
        pools = {size_name(size_hw): generated_images(_POOL, size_hw) for size_hw in sizes_hw}
        pools = pools or {"": generated_images(_POOL, _GENERATED_SIZE_HW)}
        return Workload(name="generated shapes", pools=pools, dataset=None, **timing)
    dataset = CocoDataset.load(*found[:2], images=found[2])
    if images is not None:
        dataset = replace(dataset, images=dataset.images[:images])
    files = tuple(record.path for record in dataset.images[:_POOL])
    pool = [read_image(path) for path in files]
    name = f"{found[0].name} {found[1]}, {len(pool if sizes_hw else dataset.images)} images"
    if sizes_hw:
        pools = {size_name(size_hw): [_fitted(image, size_hw) for image in pool] for size_hw in sizes_hw}
        return Workload(name=name, pools=pools, dataset=None, **timing)
    return Workload(name=name, pools={"": pool}, files=files, dataset=dataset, **timing)


def _known_split(
    artefacts: Artefacts, data: Path | None, split: str | None
) -> tuple[tuple[Path, str, Path | None] | None, str]:
    """The dataset, split and images that are given, or of the run's validation; or None and why there is no AP."""
    if data:
        return (data, find_split(data, split or "val"), None), ""
    path = artefacts.checkpoint.with_name(runs.CONFIG) if artefacts.checkpoint else None
    if path is None or not path.is_file():
        return None, "no AP: no dataset is known for these files; pass one with --data"
    config = json.loads(path.read_text(encoding="utf-8"))
    place = Path(config.get("val_data") or config["data"])  # older runs lack some of these
    images = config.get("val_images" if config.get("val_data") else "images")
    if not place.exists():
        return None, f"no AP: the run's dataset {place} does not exist; pass one with --data"
    return (place, config["val_split"], Path(images) if images else None), ""


def resnet50_workload(
    folder: Path,
    progress: Progress,
    *,
    sizes_hw: Sequence[tuple[int, int]],
    data: Path | None,
    split: str | None,
    batches: tuple[int, ...],
    repeat: int,
    budget_s: float | None,
    gpu_only: bool = False,
    checkpoint_only: bool = False,
) -> tuple[Artefacts, Workload]:
    """Make a Mask R-CNN ResNet-50 with calibrated random weights, its files, and images of each size."""
    pools = {size_name(size_hw): images_of_size(size_hw, data, split) for size_hw in sizes_hw}
    size_hw, (pool, kind) = sizes_hw[0], next(iter(pools.values()))
    progress.say(f"{_RESNET50}: random weights, batch norm and heads set from {kind}")
    sizes = {"min_size_px": min(size_hw), "max_size_px": max(max(each) for each in sizes_hw)}
    weights = calibrated_state_dict(_RESNET50, _CLASSES, pool[:4], seed=0, **sizes)
    config = model_config(
        _RESNET50,
        class_names=tuple(f"class_{label}" for label in range(1, _CLASSES)),
        category_ids=tuple(range(1, _CLASSES)),
        preprocessing=Preprocessing(**sizes),
    )
    model = MaskRCNN(config)
    load_weights(model, weights, "calibrated weights")
    checkpoint = folder / f"resnet50{SUFFIX}"
    save_checkpoint(checkpoint, model)
    artefacts, notes = Artefacts(checkpoint=checkpoint, complete=False), []
    if not checkpoint_only:
        artefacts, notes = make_files(
            checkpoint, pool, sizes_hw=sizes_hw, batches=batches, gpu_only=gpu_only, progress=progress
        )
    workload = Workload(
        name=f"{_RESNET50}, random weights, {kind} of {', '.join(pools)}",
        pools={name: images for name, (images, _) in pools.items()},
        batches=batches,
        repeat=repeat,
        budget_s=budget_s,
        dataset=None,
        notes=(*notes, *_RANDOM_WEIGHTS),
    )
    return artefacts, workload


def generated_images(count: int, size_hw: tuple[int, int]) -> list[np.ndarray]:
    """Draw images of shapes, uint8 `[H, W, 3]`."""
    return [shapes_image(np.random.default_rng((0, k)), size_hw)[0] for k in range(count)]


def images_of_size(size_hw: tuple[int, int], data: Path | None, split: str | None) -> tuple[list[np.ndarray], str]:
    """Return images of exactly this size, of a dataset or generated, and a word for them."""
    if data is None:
        return generated_images(_POOL, size_hw), "generated shapes"
    records = CocoDataset.load(data, find_split(data, split or "val")).images[:_POOL]
    return [_fitted(read_image(record.path), size_hw) for record in records], "dataset images"


def _fitted(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize an image to fit into `size_hw`, transposed if needed, and pad it with black."""
    if (image.shape[0] > image.shape[1]) != (size_hw[0] > size_hw[1]):
        image = np.ascontiguousarray(image.transpose(1, 0, 2))
    target = resized_size(image.shape[:2], Preprocessing(min_size_px=min(size_hw), max_size_px=max(size_hw)))
    resized = resize_bilinear(image, tuple(np.minimum(target, size_hw).tolist()))
    fitted = np.zeros((*size_hw, 3), np.uint8)
    fitted[: resized.shape[1], : resized.shape[2]] = resized.transpose(1, 2, 0).round().astype(np.uint8)
    return fitted


@dataclass(frozen=True)
class _Step:
    """How one file is made."""

    title: str
    path: Path
    make: Callable[[], list[str]]  # returns the comparisons of the file with its source
    backends: tuple[str, ...]  # of the file's rows
    precision: str
    keeps_rejected: bool = True


def make_files(
    checkpoint: Path,
    pool: Sequence[np.ndarray],
    *,
    sizes_hw: Sequence[tuple[int, int]],
    batches: Sequence[int],
    gpu_only: bool = False,
    progress: Progress,
) -> tuple[Artefacts, list[str]]:
    """Make every file that this machine can run, in the folder of the checkpoint.

    Args:
        checkpoint: source of the files.
        pool: calibration images for 8 bits.
        sizes_hw: image sizes of a TensorRT engine, one profile each.
        batches: batch sizes of a TensorRT engine, one profile each.
        gpu_only: do not make files for the CPU.
        progress: progress output.

    Returns:
        The files, and a line for each with its comparison.
    """
    made: list[Path] = []
    build_s: dict[Path, float] = {}
    absent: list[Contender] = []
    notes: list[str] = []
    for step in _steps(checkpoint, pool, sizes_hw, batches, gpu_only):
        progress.say(step.title)
        for left in (step.path, _rejected(step.path)):  # by an earlier run
            left.unlink(missing_ok=True)
        start, error = perf_counter(), None
        try:
            note = " ".join(f"{step.path.name} compared with {'; '.join(step.make())}".split())
            build_s[step.path] = perf_counter() - start
        except Exception as failure:  # any error of a library must not affect the other files
            error = _without_folder(failure, step.path.parent)
            note = " ".join((error.found if isinstance(error, UserError) else str(error)).split())
            progress.say(f"{step.path.name}: {note}")
        if error is None or (step.keeps_rejected and _accept_rejected(step.path)):
            made.append(step.path)
            notes.append(note)
        else:
            absent += [unavailable(step.path.name, backend, step.precision, error) for backend in step.backends]
    onnx, engines, others = (
        tuple(path for path in made if path.suffix == suffix) for suffix in (".onnx", ".xml", ".engine")
    )
    artefacts = Artefacts(
        checkpoint=checkpoint,
        onnx=onnx,
        engines=engines,
        others=others,
        absent=tuple(absent),
        complete=False,
        build_s=build_s,
    )
    return artefacts, notes


def _steps(
    checkpoint: Path,
    pool: Sequence[np.ndarray],
    sizes_hw: Sequence[tuple[int, int]],
    batches: Sequence[int],
    gpu_only: bool,
) -> list[_Step]:
    """The steps in order of dependency."""
    exported, half, integers = (checkpoint.with_suffix(f"{name}.onnx") for name in ("", ".fp16", ".int8"))
    tensorrt, half_xml, integer_xml = (
        checkpoint.with_suffix(name) for name in (".fp16.engine", ".fp16.xml", ".int8.xml")
    )

    def cast() -> list[str]:
        _require(exported)
        if obstacle := cuda_obstacle(exported):  # ONNX Runtime's CPU provider would compute in FP32
            raise obstacle
        return export(exported, output=half, precision="fp16").differences

    def build_tensorrt() -> list[str]:
        _require(exported)
        if obstacle := tensorrt_obstacle():  # before the graph is written, which would be of no use
            raise obstacle
        size = ",".join(f"{height}x{width}" for height, width in sizes_hw)
        batch = ",".join(map(str, batches))
        built = build_engine(exported, output=tensorrt, precision="fp16", target="tensorrt", batch=batch, size=size)
        return [f"the ONNX file: {built.difference}"]

    def build_half() -> list[str]:
        _require(exported)
        built = build_engine(exported, output=half_xml, precision="fp16", target="openvino")
        return [f"the ONNX file: {built.difference}"]

    def build_integers() -> list[str]:
        _require(integers)  # `build_engine` would quantise again
        built = build_openvino_engine(integers, integer_xml, half=True, reference=exported)
        return [f"the ONNX file: {built.comparison}"]

    def quantize() -> list[str]:
        _require(exported)
        folder = checkpoint.with_name("calibration")
        folder.mkdir(exist_ok=True)
        for k, image in enumerate(pool):
            Image.fromarray(image).save(folder / f"{k}.png")
        return export(exported, output=integers, precision="int8", calibration=folder).differences

    plain = ("ONNX Runtime",) if gpu_only else ("ONNX Runtime", "OpenVINO")
    for_gpu = [
        _Step("exporting to ONNX", exported, lambda: export(checkpoint, output=exported).differences, plain, "fp32"),
        # A rejected FP16 file is not measured: without CUDA it would be a simulation, whose latency is meaningless.
        _Step("casting to FP16", half, cast, ("ONNX Runtime CUDA",), "fp16", keeps_rejected=False),
        _Step("building the TensorRT engine", tensorrt, build_tensorrt, ("TensorRT",), "fp16"),
    ]
    for_cpu = [
        _Step("quantising", integers, quantize, ("ONNX Runtime",), "int8"),
        _Step("building the OpenVINO engine", half_xml, build_half, ("OpenVINO engine",), "bf16"),
        _Step("building the 8-bit engine", integer_xml, build_integers, ("OpenVINO engine",), "int8"),
    ]
    return for_gpu if gpu_only else for_gpu + for_cpu


def cuda_obstacle(onnx: Path) -> UserError | None:
    """Return why ONNX Runtime's CUDA provider cannot run an ONNX file here, or None."""
    from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
    from maskrcnn.runtime.backends.onnxruntime_providers import Provider, best_provider

    if best_provider() is not Provider.CUDA:  # not tried: ONNX Runtime would print its error
        found = "no GPU that ONNX Runtime's CUDA provider can use"
        return UserError(found, "an NVIDIA GPU, and onnxruntime-gpu with its libraries", "see `maskrcnn doctor`")
    try:
        OnnxRuntimeBackend(onnx, provider=Provider.CUDA.value)
    except UserError as error:
        return error
    return None


def _require(path: Path) -> None:
    """Check that an earlier step has made a file."""
    if not path.is_file():
        raise UserError(f"no file {path}", "the step before", "see the row of that file")


def _accept_rejected(path: Path) -> bool:
    """Rename a file that was rejected for its differences; the table will show them."""
    rejected = _rejected(path)
    if not rejected.is_file():
        return False
    if second := _SECOND_FILES.get(path.suffix):
        second(rejected).replace(second(path))
    rejected.replace(path)
    return True


def _rejected(path: Path) -> Path:
    return path.with_suffix(f".rejected{path.suffix}")


def _without_folder(error: Exception, folder: Path) -> Exception:
    """Remove the folder, which is temporary, from the file names in an error."""
    if not isinstance(error, UserError):
        return error
    return UserError(*(text.replace(f"{folder}/", "") for text in (error.found, error.expected, error.fix)))
