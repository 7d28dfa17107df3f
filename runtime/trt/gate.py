"""Whether an engine may be kept: it is compared with the ONNX file that it was built from, in ONNX Runtime.

An engine takes only what its profiles allow, so batches are padded to them, for both sides alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskrcnn.data.images import images_in, read_image
from maskrcnn.errors import UserError
from maskrcnn.preprocess import Preprocessing, batch_images
from maskrcnn.runtime.backend import Backend, TensorSpec
from maskrcnn.runtime.detector import Detector
from maskrcnn.runtime.onnxruntime_backend import OnnxRuntimeBackend
from maskrcnn.runtime.trt.profiles import Profile, roomy_shape
from maskrcnn.runtime.verification.compare import EXACT, HALF, INT8, Difference, Tolerance, compare_outputs, merge
from maskrcnn.runtime.verification.images import Batch, drawn_batches
from maskrcnn.runtime.verification.report import VerifyReport
from maskrcnn.runtime.verification.validation import batches_of_shapes
from maskrcnn.runtime.verification.verify import verify

if TYPE_CHECKING:
    from maskrcnn.data.coco import CocoDataset

Feeds = dict[str, np.ndarray]
COMPARED_IMAGES = 16  # of a folder
_LARGEST_BATCH = 8  # in which the images of a dataset are evaluated

# What an engine of each arithmetic is judged by. TF32 has FP16's ten bits.
TOLERANCES = {"fp32": EXACT, "tf32": HALF, "fp16": HALF, "bf16": HALF, "int8": INT8}
# And by how much its AP may lie below the ONNX file's. Half precision of a trained detector moved it by 0.003.
AP_LOSS = {"fp32": 0.001, "tf32": 0.005, "fp16": 0.005, "bf16": 0.01, "int8": 0.02}


@dataclass(frozen=True, kw_only=True)
class GateImages:
    """What an engine is compared on, beside drawn shapes in the corners of its profiles."""

    folder: Path | None = None
    annotations: Path | None = None  # COCO's, of images in the folder: then AP is compared too
    limit: int = COMPARED_IMAGES  # of the folder; AP is of all annotated ones

    def __post_init__(self) -> None:
        if self.annotations is not None and self.folder is None:
            came = f"--gate-annotations {self.annotations} without --gate-images"
            raise UserError(came, "the folder of the annotated images", "add --gate-images FOLDER")

    def check(self) -> None:
        """That they can be read: before an engine is built, which takes minutes.

        Raises:
            UserError: for a folder without images, and annotations that cannot be used.
        """
        if self.folder is not None:
            images_in(self.folder, self.limit)
        if self.annotations is not None:
            self.dataset()

    def dataset(self) -> CocoDataset:
        """The annotated images."""
        from maskrcnn.data.coco import CocoDataset  # needs pycocotools, which a build without annotations does not

        return CocoDataset.read(self.annotations, self.folder.resolve())


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """How far an engine is from its ONNX file."""

    difference: Difference
    tolerance: Tolerance
    ap: dict[str, tuple[float, float]]  # `box_ap`, `mask_ap` …: of the ONNX file, and of the engine; {}: not measured
    ap_loss: float  # that is allowed

    @property
    def accepted(self) -> bool:
        """Whether the engine may be kept."""
        losses = [reference - engine for reference, engine in self.ap.values()]
        return self.difference.within(self.tolerance) and all(loss <= self.ap_loss for loss in losses)

    def text(self) -> str:
        """One sentence."""
        aps = "".join(f"; {name} {engine:.4f}, of the ONNX file {ref:.4f}" for name, (ref, engine) in self.ap.items())
        return f"{self.difference}{aps}"

    def expected(self) -> str:
        """What would have been accepted."""
        return f"{self.tolerance}" + (f", AP at most {self.ap_loss:g} lower" if self.ap else "")


class Fitted(Backend):
    """A backend whose batches are padded to what the profiles of an engine take.

    Images are padded right and below, which the model does not see, and batches by images of size 0 × 0, whose results
    are left out.

    Args:
        backend: the engine, or what it is compared with.
        profiles: the engine's.
        one_by_one: give the backend one image after the other, which needs less memory.
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
        found = self.backend.stages(padded_feeds(feeds, self.profiles), names)
        return {name: value[: len(feeds["images"])] for name, value in found.items()}


class Instrumented(Backend):
    """An engine, and another one of the same graph that shows the tensors on the way.

    Args:
        backend: the engine.
        show: makes what gives the named tensors for a batch; it is called when they are first asked for.
    """

    def __init__(self, backend: Backend, show: Callable[[Sequence[str]], Callable[[Feeds], Feeds]]) -> None:
        self.backend, self._make, self._show = backend, show, None
        self.name, self.precision, self.metadata = backend.name, backend.precision, backend.metadata

    def describe(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        return self.backend.describe()

    def infer(self, feeds: Feeds) -> Feeds:
        return self.backend.infer(feeds)

    def stages(self, feeds: Feeds, names: Sequence[str]) -> Feeds:
        self._show = self._show or self._make(names)
        return self._show(feeds)


def padded_feeds(feeds: Feeds, profiles: Sequence[Profile]) -> Feeds:
    """A batch padded to the smallest shape that a profile takes.

    Raises:
        UserError: where the batch is larger than every profile.
    """
    images, sizes = feeds["images"], feeds["image_sizes"]
    shape = (images.shape[0], *images.shape[2:])
    batch, height, width = roomy_shape(profiles, shape)
    if (batch, height, width) == shape:
        return feeds
    padding = [(0, batch - len(images)), (0, 0), (0, height - shape[1]), (0, width - shape[2])]
    return {"images": np.pad(images, padding), "image_sizes": np.pad(sizes, [(0, batch - len(sizes)), (0, 0)])}


def gate(
    engine: Backend,
    reference: Path,
    profiles: Sequence[Profile],
    precision: str,
    images: GateImages,
    progress: Callable[[str], None] = lambda what: None,
) -> GateResult:
    """Compares an engine with an ONNX file in ONNX Runtime on the CPU.

    Args:
        engine: to be judged.
        reference: the ONNX file, in single precision.
        profiles: the engine's; each is tried at its least, best and greatest shape.
        precision: of the engine's arithmetic, a key of `TOLERANCES`.
        images: more to compare on.
        progress: called with what is being done.

    Raises:
        UserError: for a folder without images, for images larger than all profiles, and for annotations of other
            classes.
    """
    tolerance, parts = TOLERANCES[precision], []
    other = Fitted(engine, profiles)
    against = Fitted(OnnxRuntimeBackend(reference, providers=["CPUExecutionProvider"]), profiles, one_by_one=True)
    for name, feeds in _batches(engine, profiles, images):
        progress(f"comparing with {reference.name} on {name}")
        parts.append(compare_outputs(against(feeds), other(feeds), tolerance))
    ap = {}
    if images.annotations is not None:
        ap = _average_precision(engine, reference, images, profiles, progress)
    return GateResult(difference=merge(parts), tolerance=tolerance, ap=ap, ap_loss=AP_LOSS[precision])


def stage_report(engine: Instrumented, reference: Path, profiles: Sequence[Profile]) -> VerifyReport:
    """Which stages of an engine depart from the ONNX file, on drawn shapes, one image after the other.

    Raises:
        UserError: where the profiles take none of these images.
    """
    against = OnnxRuntimeBackend(reference, providers=["CPUExecutionProvider"])
    singles = [pair for batch in drawn_batches() for pair in zip(batch.names, batch.images, strict=True)]
    fitting = [
        Batch((name,), (image,))
        for name, image in singles
        if image.size and _fits(image, engine.metadata.preprocessing, profiles)
    ]
    return verify(Fitted(against, profiles), Fitted(engine, profiles), fitting)


def _fits(image: np.ndarray, preprocessing: Preprocessing, profiles: Sequence[Profile]) -> bool:
    """Whether a profile takes an image, after resizing and padding."""
    pixels, sizes = batch_images([image], preprocessing)
    try:
        padded_feeds({"images": pixels, "image_sizes": sizes}, profiles)
    except UserError:
        return False
    return True


def _batches(engine: Backend, profiles: Sequence[Profile], images: GateImages) -> Iterator[tuple[str, Feeds]]:
    """Batches with their names."""
    corners = [profile.corner(which) for profile in profiles for which in ("least", "best", "greatest")]
    for batch, height, width in dict.fromkeys(corners):
        for feeds in batches_of_shapes([(batch, height, width)]):
            yield f"{batch} drawn image(s) of {height}×{width}", feeds
    if images.folder is not None:
        for path in images_in(images.folder, images.limit):
            pixels, sizes = batch_images([read_image(path)], engine.metadata.preprocessing)
            yield path.name, {"images": pixels, "image_sizes": sizes}


def _average_precision(
    engine: Backend,
    reference: Path,
    images: GateImages,
    profiles: Sequence[Profile],
    progress: Callable[[str], None],
) -> dict[str, tuple[float, float]]:
    """AP of the ONNX file, on a GPU where ONNX Runtime has one, and of the engine as a `Detector` runs it."""
    from maskrcnn.runtime.evaluate import evaluate

    dataset = images.dataset()
    batch_size = min(max(profile.batch.best for profile in profiles), _LARGEST_BATCH)
    found = []
    for name, backend in ((reference.name, Fitted(OnnxRuntimeBackend(reference), profiles)), ("the engine", engine)):
        progress(f"AP of {name} on {len(dataset.images)} images")
        found.append(evaluate(Detector(backend), dataset, batch_size=batch_size).summary())
    return {key: (found[0][key], found[1][key]) for key in found[0]}
