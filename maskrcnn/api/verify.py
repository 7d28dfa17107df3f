"""`maskrcnn.verify(...)`: compares two model files stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maskrcnn.api.progress import Progress
from maskrcnn.api.results import Result
from maskrcnn.errors import UserError, check_range
from maskrcnn.files import PAGE, Output, atomic_path, check_outputs, report_kind, report_path, write_report

if TYPE_CHECKING:
    from maskrcnn.imaging.preprocess import Preprocessing
    from maskrcnn.runtime.backends.base import Backend
    from maskrcnn.runtime.verification.inputs import Batch
    from maskrcnn.runtime.verification.report import VerifyReport


@dataclass(frozen=True, repr=False)
class VerifyResult(Result):
    """Whether two models agree, and the first stage that differs."""

    ok: bool
    reference: Path
    other: Path
    conclusion: str
    first_departure: str | None  # name of the first stage beyond its tolerance
    report: Path | None = None  # the HTML page
    details: VerifyReport | None = field(default=None, repr=False)  # every stage: errors, limits, worst images


def verify(
    reference: str | Path,
    other: str | Path,
    *,
    images: str | Path | Sequence[str | Path] = (),
    max_images: int = 16,
    size: int | None = None,
    tolerance: Literal["exact", "half", "int8"] | None = None,
    json: str | Path | None = None,
    report: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> VerifyResult:
    """Compares two model files on the CPU, from the normalised image to masks and keypoints.

    Args:
        reference: checkpoint, ONNX file or engine.
        other: the file to compare with the reference.
        images: image files and folders. Default: drawn shapes.
        max_images: maximum number of images to compare on.
        size: shorter side of the resized images, px. Default: the models'.
        tolerance: limits of every stage. Default: those of the lower of the two precisions.
        json: file to write every stage's errors to.
        report: HTML file to write, or a folder for `report.html`.
        overwrite: replace output files that `verify` did not write; input files are never replaced.
        progress: receives messages.

    Raises:
        UserError: for files that cannot be used, models that cannot be compared, and folders without images.
    """
    from maskrcnn.runtime.verification.inputs import drawn_batches
    from maskrcnn.runtime.verification.report import html_page
    from maskrcnn.runtime.verification.tolerances import tolerances_named
    from maskrcnn.runtime.verification.verify import check_comparable
    from maskrcnn.runtime.verification.verify import verify as compare

    check_range("max_images", max_images, 1)
    check_range("size", size, 1)
    progress = progress or Progress()
    first, second = Path(reference), Path(other)
    limits = tolerances_named(tolerance) if tolerance else None
    page = None if report is None else report_path(Path(report))
    given = [images] if isinstance(images, (str, Path)) else images
    outputs = [
        *([Output("--json", Path(json), report_kind("verify"))] if json is not None else []),
        *([Output("--report", page, PAGE)] if page is not None else []),
    ]
    check_outputs(outputs, (first, second, *given), overwrite=overwrite)
    paths = _image_files(given, max_images)
    models = [_on_cpu(path) for path in (first, second)]
    check_comparable(models[0].metadata, models[1].metadata)
    preprocessing = models[0].metadata.preprocessing
    if len(paths) > max_images:
        progress.message(f"the first {max_images} images (--max-images)")
    with progress.task("comparing") as advance:
        details = compare(
            models[0],
            models[1],
            _read(paths[:max_images], preprocessing) if paths else drawn_batches(preprocessing.channels),
            limits,
            size_px=size,
            progress=lambda name: advance(1),
        )
    for role, path, model in zip(("reference", "other"), (first, second), details.models, strict=True):
        progress.message(f"{role}: {path} in {model}")
    names = (str(first), str(second))
    if json is not None:
        content: dict[str, Any] = {"reference": names[0], "other": names[1], **details.to_dict()}
        write_report(Path(json), "verify", content)
    if page is not None:
        with atomic_path(page) as draft:
            draft.write_text(html_page(details, names, models[0].metadata), encoding="utf-8")
    return VerifyResult(details.ok, first, second, details.conclusion(), details.first_departure, page, details)


def _image_files(paths: Sequence[str | Path], limit: int) -> list[Path]:
    """The image files among files and folders; from a folder at most `limit`, evenly spaced by name."""
    from maskrcnn.data.images import images_in

    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += images_in(path, limit)
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"no file or folder {path}", "images to compare the models on", "check the path")
    return files


def _on_cpu(path: Path) -> Backend:
    """The model on the CPU, which computes in the precision of the file: GPUs may use TF32 for FP32 by default."""
    from maskrcnn.runtime.detector import load_backend
    from maskrcnn.runtime.engine_files import check_portable, read_model

    if path.suffix == ".safetensors":
        return load_backend(path, device="cpu")
    if path.suffix != ".onnx":
        return load_backend(path)
    proto, metadata = read_model(path)
    check_portable(proto, path)
    if metadata.precision == "bf16":  # ONNX Runtime has no CPU kernels for it
        return load_backend(path, "openvino")
    return load_backend(path, providers=["CPUExecutionProvider"])


def _read(paths: Sequence[Path], preprocessing: Preprocessing) -> Iterator[Batch]:
    """One image per batch: the padding of a batch changes its other images slightly."""
    from maskrcnn.data.images import read_image
    from maskrcnn.runtime.verification.inputs import Batch

    for path in paths:
        yield Batch((path.name,), (read_image(path, preprocessing),))
