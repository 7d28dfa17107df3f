"""The comparison that decides whether a TensorRT engine is kept: against its ONNX file in ONNX Runtime.

An engine accepts only the shapes of its profiles, so batches are padded to these shapes for both models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskrcnn.data.images import images_in, read_image
from maskrcnn.imaging.preprocess import Preprocessing, batch_images
from maskrcnn.runtime.backends.base import Backend, TensorSpec, stages_of
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.build.profiles import Profile, padded_shape
from maskrcnn.runtime.build.request import BuildRequest, Comparison, Progress
from maskrcnn.runtime.detector import Detector
from maskrcnn.runtime.verification.compare import TOLERANCES, compare_outputs, merge
from maskrcnn.runtime.verification.inputs import Batch, batches_of_shapes, drawn_batches
from maskrcnn.runtime.verification.report import VerifyReport
from maskrcnn.runtime.verification.verify import verify

if TYPE_CHECKING:
    from maskrcnn.data.coco import CocoDataset

Feeds = dict[str, np.ndarray]
_MAX_BATCH = 8  # for the evaluation

# Accepted loss of AP. Half precision changed the AP of a trained detector by 0.003.
MAX_AP_LOSS = {"fp32": 0.001, "tf32": 0.005, "fp16": 0.005, "bf16": 0.01, "int8": 0.02}


class PaddedBackend(Backend):
    """A backend whose batches are padded to shapes that the profiles of an engine accept.

    Images are padded at the right and bottom, which does not change the detections; batches are padded with images of
    size 0 × 0, whose results are dropped.

    Args:
        backend: the engine, or the reference of the comparison.
        profiles: profiles of the engine.
        one_by_one: run the images one at a time, which needs less memory.
    """

    def __init__(self, backend: Backend, profiles: Sequence[Profile], *, one_by_one: bool = False) -> None:
        self.backend, self.profiles, self.one_by_one = backend, profiles, one_by_one
        self.name, self.precision, self.metadata = backend.name, backend.precision, backend.metadata

    def describe(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        return self.backend.describe()

    def infer(self, feeds: Feeds) -> Feeds:
        padded = padded_feeds(feeds, self.profiles)
        count = len(feeds["images"])
        if not self.one_by_one:
            return {name: value[:count] for name, value in self.backend(padded).items()}
        singles = [self.backend({name: value[n : n + 1] for name, value in padded.items()}) for n in range(count)]
        return {name: np.concatenate([single[name] for single in singles]) for name in singles[0]}

    def stages(self, feeds: Feeds, names: Sequence[str]) -> Feeds:
        stages = stages_of(self.backend, padded_feeds(feeds, self.profiles), names)
        return {name: value[: len(feeds["images"])] for name, value in stages.items()}


class _StagedBackend(Backend):
    """An engine whose stages come from a second engine, opened on the first request for them."""

    def __init__(self, backend: Backend, open_stages: Callable[[Sequence[str]], Callable[[Feeds], Feeds]]) -> None:
        self.backend, self._open = backend, open_stages
        self._stages: Callable[[Feeds], Feeds] | None = None
        self.name, self.precision, self.metadata = backend.name, backend.precision, backend.metadata

    def describe(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        return self.backend.describe()

    def infer(self, feeds: Feeds) -> Feeds:
        return self.backend.infer(feeds)

    def stages(self, feeds: Feeds, names: Sequence[str]) -> Feeds:
        self._stages = self._stages or self._open(names)
        return self._stages(feeds)


def padded_feeds(feeds: Feeds, profiles: Sequence[Profile]) -> Feeds:
    """Pads a batch to the smallest shape that a profile accepts.

    Raises:
        UserError: if the batch exceeds every profile.
    """
    images, sizes = feeds["images"], feeds["image_sizes"]
    shape = (images.shape[0], images.shape[2], images.shape[3])
    batch, height, width = padded_shape(profiles, shape)
    if (batch, height, width) == shape:
        return feeds
    padding = [(0, batch - len(images)), (0, 0), (0, height - shape[1]), (0, width - shape[2])]
    return {"images": np.pad(images, padding), "image_sizes": np.pad(sizes, [(0, batch - len(sizes)), (0, 0)])}


def check_gate_images(request: BuildRequest) -> None:
    """Reads the images and annotations for the comparison, so that errors appear before the long build.

    Raises:
        UserError: for a folder without images, and annotations that cannot be read.
    """
    if request.gate_images is not None:
        images_in(request.gate_images, request.gate_max_images)
    if request.gate_annotations is not None:
        gate_dataset(request)


def gate_dataset(request: BuildRequest) -> CocoDataset:
    """The annotated images of the comparison."""
    from maskrcnn.data.coco import CocoDataset  # needs pycocotools, which a build without annotations does not

    if request.gate_images is None or request.gate_annotations is None:
        raise ValueError("a request without annotated images")
    return CocoDataset.read(request.gate_annotations, request.gate_images.resolve())


def gate(engine: Backend, request: BuildRequest, profiles: Sequence[Profile], progress: Progress) -> Comparison:
    """Compares an engine with its ONNX file in ONNX Runtime on the CPU.

    Args:
        engine: the engine.
        request: the ONNX file, the precision of the engine, and images to compare on in addition to drawn shapes.
        profiles: profiles of the engine; each is run at its min, opt and max shape.
        progress: receives the steps.

    Raises:
        UserError: for a folder without images, images that exceed every profile, annotations of other classes, and an
            engine whose labels exceed the classes.
    """
    tolerance, differences = TOLERANCES[request.precision], []
    reference = OnnxRuntimeBackend(request.model, providers=["CPUExecutionProvider"])
    expected, found = PaddedBackend(reference, profiles, one_by_one=True), PaddedBackend(engine, profiles)
    for name, feeds in _batches(engine, request, profiles):
        with progress.task(f"comparing with {request.model.name} on {name}"):
            classes = len(reference.metadata.class_names)
            differences.append(compare_outputs(expected(feeds), found(feeds), tolerance, num_classes=classes))
    difference = merge(differences)
    if not difference.detections:
        progress.message(
            f"no detection in the {difference.images} images compared: boxes, scores and masks of the engine are not "
            "verified; compare on images with objects: --gate-images DIR"
        )
    return Comparison(
        difference=difference,
        tolerance=tolerance,
        ap={} if request.gate_annotations is None else average_precision(engine, request, profiles, progress),
        max_ap_loss=MAX_AP_LOSS[request.precision],
        images=request.compared_images,
    )


def stage_report(
    engine: Backend,
    open_stages: Callable[[Sequence[str]], Callable[[Feeds], Feeds]],
    model: Path,
    profiles: Sequence[Profile],
) -> VerifyReport:
    """Compares the stages of an engine with those of its ONNX file, on drawn shapes, one image at a time.

    Args:
        engine: the engine.
        open_stages: returns a function that computes the named stages of a batch as the engine does.
        model: the ONNX file.
        profiles: profiles of the engine.

    Raises:
        UserError: if the profiles accept none of these images.
    """
    reference = OnnxRuntimeBackend(model, providers=["CPUExecutionProvider"])
    singles = [
        pair
        for batch in drawn_batches(engine.metadata.preprocessing.channels)
        for pair in zip(batch.names, batch.images, strict=True)
    ]
    fitting = []
    for name, image in singles:
        if image.size:
            pixels, _ = batch_images([image], engine.metadata.preprocessing)
            _, _, height, width = pixels.shape
            if any(profile.height.max >= height and profile.width.max >= width for profile in profiles):
                fitting.append(Batch((name,), (image,)))
    staged = _StagedBackend(engine, open_stages)
    return verify(PaddedBackend(reference, profiles), PaddedBackend(staged, profiles), fitting)


def _batches(engine: Backend, request: BuildRequest, profiles: Sequence[Profile]) -> Iterator[tuple[str, Feeds]]:
    """Batches and their descriptions."""
    preprocessing = engine.metadata.preprocessing
    corners = [profile.corner(which) for profile in profiles for which in ("min", "opt", "max")]
    for batch, height, width in dict.fromkeys(corners):
        for feeds in batches_of_shapes([(batch, height, width)], preprocessing.channels):
            yield f"{batch} drawn image(s) of {height}×{width}", feeds
    yield from gate_feeds(request, preprocessing)


def gate_feeds(request: BuildRequest, preprocessing: Preprocessing) -> Iterator[tuple[str, Feeds]]:
    """Yields file name and inputs of each of the user's comparison images; nothing without a folder."""
    for path in [] if request.gate_images is None else images_in(request.gate_images, request.gate_max_images):
        pixels, sizes = batch_images([read_image(path, preprocessing)], preprocessing)
        yield path.name, {"images": pixels, "image_sizes": sizes}


def average_precision(
    engine: Backend, request: BuildRequest, profiles: Sequence[Profile], progress: Progress
) -> dict[str, tuple[float, float]]:
    """AP of the ONNX file, on a GPU if ONNX Runtime can use one, and of the engine as a `Detector` runs it.

    Args:
        engine: the engine.
        request: the ONNX file, and the annotated images.
        profiles: profiles of a TensorRT engine; () for an engine without fixed shapes.
        progress: receives the steps.
    """
    from maskrcnn.runtime.evaluation.evaluate import evaluate

    dataset = gate_dataset(request)
    batch_size = min(max((profile.batch.opt for profile in profiles), default=1), _MAX_BATCH)
    summaries = []
    reference: Backend = OnnxRuntimeBackend(request.model)
    if profiles:
        reference = PaddedBackend(reference, profiles)
    for name, backend in ((request.model.name, reference), ("the engine", engine)):
        with progress.task(f"AP of {name} on {len(dataset.images)} images"):
            summaries.append(evaluate(Detector(backend), dataset, batch_size=batch_size).summary())
    return {key: (value, summaries[1][key]) for key, value in summaries[0].items()}
