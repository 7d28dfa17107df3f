"""The work of `maskrcnn predict`, apart from parsing its options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from maskrcnn.errors import UserError


def run_predict(
    console: Console,
    images: Sequence[Path],
    *,
    model: Path,
    backend: str | None,
    output: Path,
    threshold: float,
    keypoint_threshold: float,
) -> None:
    """Writes an overlay picture for each image, and all results in COCO's format.

    Args:
        images: files and folders.
        backend: as `Detector.load` takes it.
        threshold: lowest score of a detection that is drawn; the results have all.
        keypoint_threshold: lowest score of a keypoint that is drawn, a logit.

    Raises:
        UserError: before anything is written, for images that cannot be read and for pictures that would take the
            place of an image.
    """
    from maskrcnn.data.images import read_image
    from maskrcnn.files import atomic_path, make_folder, write_json
    from maskrcnn.imaging.draw import overlay
    from maskrcnn.imaging.postprocess import coco_results
    from maskrcnn.runtime.detector import Detector

    images = _expanded(images)
    targets = _targets(images, output)
    for path in images:  # read now for the faults, and again at its turn: together they may not fit into memory
        read_image(path)
    detector = Detector.load(model, backend)
    metadata = detector.metadata
    make_folder(output)
    results = []
    for number, (path, target) in enumerate(zip(images, targets, strict=True), start=1):
        image = read_image(path)
        found = detector.detect([image])[0]
        results += coco_results(found, number, metadata.category_ids, with_masks=metadata.has_masks)
        confident = found.above(threshold)
        drawn = overlay(
            image, confident, metadata.class_names, metadata.keypoint_skeleton, point_score=keypoint_threshold
        )
        with atomic_path(target) as draft:
            drawn.save(draft, format="PNG")
        points = ""
        if confident.keypoints is not None:
            shown = int((confident.keypoints[:, :, 2] >= keypoint_threshold).sum())
            points = f" with {shown} of {confident.keypoints[:, :, 2].size} keypoints"
        console.print(f"{path}: {len(confident)} of {len(found)} detections drawn{points} → {target}")
    write_json(output / "results.json", results)
    write_json(output / "images.json", {str(n): str(path) for n, path in enumerate(images, start=1)})
    for line in detector.backend.remarks():
        console.print(line, markup=False)
    console.print(f"{len(results)} results → {output / 'results.json'} (image ids in images.json)")


def _expanded(images: Sequence[Path]) -> list[Path]:
    """The images, those of a folder in its place."""
    from maskrcnn.data.images import images_in

    return [found for path in images for found in (images_in(path, sys.maxsize) if path.is_dir() else [path])]


def _targets(images: Sequence[Path], output: Path) -> list[Path]:
    """The picture of each image: its name, with a number where several images of one name are in different folders.

    Raises:
        UserError: where a picture would replace one of the images.
    """
    stems, taken, targets = [path.stem for path in images], set(), []
    for number, stem in enumerate(stems, start=1):
        name = f"{stem}-{number}" if stems.count(stem) > 1 else stem
        while name in taken:
            name += f"-{number}"
        taken.add(name)
        targets.append(output / f"{name}.png")
    originals = {path.resolve() for path in images}
    for target in targets:
        if target.resolve() in originals:
            raise UserError(
                f"--output {output}, where the picture {target.name} would replace the image of that name",
                "a folder apart from the images",
                "name another --output",
            )
    return targets
