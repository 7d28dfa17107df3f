"""The output folder of `maskrcnn predict`: its files, and how an interrupted run is continued."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskrcnn.data.sources import ImageItem, Source, file_system, is_remote
from maskrcnn.errors import UserError

if TYPE_CHECKING:
    from maskrcnn.metadata import ModelMetadata
    from maskrcnn.runtime.detector import Detector
    from maskrcnn.runtime.tiles import Tiles

RUN, FAILED, LABELS = "run.json", "failed.txt", "annotations.json"
_READERS = 16  # files read concurrently
_FAILED_HEAD = "# images that maskrcnn could not use"


@dataclass(frozen=True, eq=False)
class Job(ImageItem):
    """An image, and what to write for it."""

    image_id: int = 0
    source: Source | None = None
    target: Path | None = None  # path of the overlay
    fault: UserError | None = None  # for a video that ends early: its error, in place of the next frame

    @property
    def is_file(self) -> bool:
        return self.fault is None and super().is_file

    def read(self, preprocessing: Any, notes: Any) -> tuple[np.ndarray, int]:
        if self.fault is not None:
            raise self.fault
        return super().read(preprocessing, notes)


def jobs_of(sources: Sequence[Source], ids: Sequence[int] | None, targets: dict[Source, Path]) -> Iterator[Job]:
    """The images of all sources, numbered from 1 if `ids` is None."""
    number = 0
    for index, source in enumerate(sources):
        target = targets.get(source)
        images = source.images()
        while True:
            number += 1
            image_id = number if ids is None else ids[index]
            try:
                item = next(images, None)
            except UserError as error:
                yield Job(source.name, image_id=image_id, source=source, fault=error)
                break
            if item is None:
                number -= 1
                break
            place = target
            if target is not None and item.frame is not None:
                place = target.with_name(f"{target.stem}-{item.frame.index:06d}{target.suffix}")
            yield Job(item.name, item.pixels, item.frame, image_id, source, place)


class PredictionFolder:
    """The output folder of a run.

    Raises:
        UserError: if images or other files would be replaced; if the folder has an interrupted run, but neither
            `resume` nor `overwrite` is set; or if there is no run to resume.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        saved: frozenset[str],
        suffix: str,
        named: Sequence[str | Path | np.ndarray],
        inputs: Sequence[str | Path | None],
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        from maskrcnn.data.video import VIDEO, video_suffix
        from maskrcnn.files import (
            DRAWING,
            RESULTS_FILE,
            FileKind,
            Output,
            check_output_folder,
            check_outputs,
            report_kind,
        )
        from maskrcnn.runtime import predictions

        self.folder, self.saved, self.is_resumed = folder, saved, resume
        self.sources = sources
        stems = _stems(sources)
        self.targets = {
            source: folder / f"{stem}.{suffix}"
            for source, stem in zip(sources, stems, strict=True)
            if "overlays" in saved
        }
        self.videos = {
            source: folder / f"{stem}{video_suffix(source)}"
            for source, stem in zip(sources, stems, strict=True)
            if source.is_video and "video" in saved
        }
        lines = FileKind.starting_with("the detections.jsonl of `maskrcnn predict`", rb'\{"image_id": ')
        index = FileKind.starting_with("the images.json of `maskrcnn predict`", rb'\{\s*"\d+": "')
        labels = FileKind.starting_with("labels of `maskrcnn predict`", rb'\{"info": \{"description": "detections of')
        table = FileKind.starting_with("a Parquet file", rb"PAR1")
        text = FileKind.starting_with("the failed.txt of `maskrcnn predict`", _FAILED_HEAD.encode())
        fixed = {
            predictions.LINES: lines,
            predictions.IMAGES: index,
            RUN: report_kind("predict"),
            FAILED: text,
            **({predictions.RESULTS: RESULTS_FILE} if "results" in saved else {}),
            **({predictions.PARQUET: table} if "parquet" in saved else {}),
            **({LABELS: labels} if "coco" in saved else {}),
        }
        folders = [each for each in named if not isinstance(each, np.ndarray) and Path(each).is_dir()]
        kinds = (DRAWING, RESULTS_FILE, VIDEO, lines, index, report_kind("predict"), table, labels, text)
        check_output_folder("--output", folder, folders, kinds, overwrite=True)
        outputs = [
            Output("--output", target, DRAWING) for source, target in self.targets.items() if not source.is_video
        ]
        outputs += [Output("--output", target, VIDEO) for target in self.videos.values()]
        outputs += [Output("--output", folder / name, kind) for name, kind in fixed.items()]
        lists = [each for each in named if not isinstance(each, np.ndarray) and Path(each).is_file()]
        read = [source.name for source in sources if source.pixels is None and "://" not in source.name]
        check_outputs(outputs, [*lists, *read, *(each for each in inputs if each is not None)], overwrite=overwrite)
        if not {"labelme", "yolo"}.isdisjoint(saved):
            _check_label_names(sources)
        own = {predictions.RESULTS: RESULTS_FILE, predictions.PARQUET: table, predictions.IMAGES: index, LABELS: labels}
        self._made = {folder / name: kind for name, kind in own.items()}  # written at the end, from the lines
        self.lines, self._manifest = folder / predictions.LINES, folder / RUN
        self.results = folder / (predictions.RESULTS if "results" in saved else predictions.LINES)
        if "parquet" in saved and "results" not in saved:
            self.results = folder / predictions.PARQUET
        self.drawn: list[Path] = []
        self.undrawn = 0  # completed images without an overlay or a frame in an annotated video
        self._video: Any = None  # the video being written, and its source
        for name in ("labelme", "yolo"):  # their files may have been corrected by hand
            if name in saved and not resume and not overwrite and (folder / name).exists():
                found = f"--save {name}: {folder / name} exists, perhaps with corrected labels"
                raise UserError(
                    found, "an output folder without it", "choose another --output, or replace it with --overwrite"
                )
        before = self._read_manifest()
        self._is_extended = False
        self._was_complete = resume and before is not None and bool(before.get("is_complete"))
        if resume and before is None:
            raise UserError(f"--resume: no {self._manifest}", "the folder of an interrupted run", "leave out --resume")
        if before is not None and not resume and not overwrite and before.get("is_complete") is False:
            raise UserError(
                f"{folder} has an interrupted run",
                "a new folder, or one with a complete run",
                "continue it with --resume, start again with --overwrite, or choose another --output",
            )

    def _read_manifest(self) -> dict[str, Any] | None:
        from maskrcnn.files import read_json

        if not self._manifest.is_file():
            return None
        content = read_json(self._manifest, "the run.json of `maskrcnn predict`")
        return content if isinstance(content, dict) else {}

    def start(
        self, about: dict[str, Any], jobs: Iterator[Job]
    ) -> tuple[Iterator[Job], int, list[str], list[int], dict[str, str]]:
        """Opens the files; returns the remaining images, and the records of the completed ones.

        Raises:
            UserError: if an interrupted run has another model, other options or other images.
        """
        from maskrcnn.files import make_folder, write_report
        from maskrcnn.runtime.predictions import Predictions, read_predictions

        self._about = about
        names, counts, failed = list[str](), list[int](), dict[str, str]()
        done = 0
        if self.is_resumed:
            before = self._read_manifest() or {}
            _check_same(self.folder, before, self._about)
            redone = None if before.get("is_complete") else self._interrupted_video()
            for record in read_predictions(self.lines) if self.lines.is_file() else ():
                if redone is not None and str(record["file"]).rpartition("#")[0] == redone:
                    break
                job = next(jobs, None)
                if job is None or job.name != record["file"]:
                    found = f"image {done + 1} is {None if job is None else job.name}, not {record['file']}"
                    expected = f"the images of the run in {self.folder}, in their order"
                    raise UserError(found, expected, "pass the same images, or choose another --output")
                if job.target is not None and job.target.is_file() and "error" not in record:
                    self.drawn.append(job.target)
                elif "error" not in record:
                    video = self.videos.get(job.source) if job.source is not None else None
                    self.undrawn += job.target is not None or (video is not None and not video.is_file())
                if "error" in record:
                    failed[job.name] = record["error"]
                else:
                    names.append(job.name)
                    counts.append(len(record["detections"]))
                done += 1
        make_folder(self.folder)
        write_report(self._manifest, "predict", {"is_complete": False, **self._about})
        for path, kind in () if self.is_resumed else self._made.items():  # of an earlier run, which is replaced
            if path.is_file() and kind.recognises(path):
                path.unlink()
        self._lines = Predictions(self.lines, keep=done)
        return jobs, done, names, counts, failed

    def _interrupted_video(self) -> str | None:
        """The video of the last completed image, if its annotated video was not finished and must start again."""
        from maskrcnn.runtime.predictions import read_predictions

        last = ""
        for record in read_predictions(self.lines) if self.lines.is_file() else ():
            last = str(record["file"])
        name = last.rpartition("#")[0]
        return name if any(source.name == name for source in self.videos) else None

    def add(self, job: Job, record: str, drawn: np.ndarray | None) -> None:
        """Writes the line of an image, and its frame in the annotated video."""
        from maskrcnn.data.video import AnnotatedVideo

        if self._video is not None and self._video[0] is not job.source:
            self._close_video()
        if drawn is not None and job.frame is not None and job.source in self.videos:
            if self._video is None:
                self._video = (job.source, AnnotatedVideo(job.source, self.videos[job.source]))
            self._video[1].add(drawn, job.frame)
        self._lines.append(record)
        self._is_extended = True
        if job.target is not None and job.target.is_file() and job.fault is None and '"error"' not in record:
            self.drawn.append(job.target)

    def _close_video(self, *, is_complete: bool = True) -> None:
        if self._video is not None:
            video, self._video = self._video[1], None
            video.close(is_complete=is_complete)

    def finish(
        self, metadata: ModelMetadata, threshold: float, tolerance_px: float, *, is_complete: bool, is_empty: bool
    ) -> None:
        """Closes the files and writes those derived from the lines; an empty run leaves nothing behind.

        Args:
            metadata: the model's metadata.
            threshold: minimum score of labels.
            tolerance_px: tolerance of their outlines, see `maskrcnn.data.prelabels.outlines`.
            is_complete: whether all images are done.
            is_empty: whether no image could be used.
        """
        from maskrcnn.data import prelabels
        from maskrcnn.files import atomic_path, write_report
        from maskrcnn.runtime import predictions

        self._lines.close()
        self._close_video(is_complete=is_complete)
        self.drawn += [video for video in self.videos.values() if is_complete and video.is_file()]
        if is_empty:
            for path in (self.lines, self._manifest):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                self.folder.rmdir()
            return

        def is_due(kind: str, name: str) -> bool:  # if nothing was added, existing labels may have been corrected since
            is_kept = self._was_complete and not self._is_extended and (self.folder / name).exists()
            return kind in self.saved and not is_kept

        if is_due("results", predictions.RESULTS):
            predictions.write_results(self.lines, self.folder / predictions.RESULTS)
        predictions.write_images(self.lines, self.folder / predictions.IMAGES)
        if not is_complete:
            return
        if is_due("parquet", predictions.PARQUET):
            records = predictions.read_predictions(self.lines)
            predictions.write_parquet(records, self.folder / predictions.PARQUET, self._about)

        def again() -> Iterator[dict[str, Any]]:
            return predictions.read_predictions(self.lines)

        settings = (threshold, tolerance_px)
        if is_due("coco", LABELS):
            prelabels.write_coco(again, self.folder / LABELS, _categories(metadata), *settings)
        if "labelme" in self.saved:
            prelabels.write_labelme(again, self.folder / "labelme", *settings, keep=self.is_resumed)
        if "yolo" in self.saved:
            prelabels.write_yolo(again, self.folder / "yolo", _categories(metadata), *settings, keep=self.is_resumed)
        failed = [record["file"] for record in again() if "error" in record]
        if failed:
            text = "\n".join((_FAILED_HEAD, *(str(Path(name).absolute()) for name in failed), ""))
            with atomic_path(self.folder / FAILED) as draft:
                draft.write_bytes(text.encode("utf-8", "surrogateescape"))
        else:
            (self.folder / FAILED).unlink(missing_ok=True)
        write_report(self._manifest, "predict", {"is_complete": True, **self._about})


class BlockFolder:
    """The output of a run on Ray: the folder `detections.parquet`, with a file for each block of images.

    Local files are written to `detections.parquet.part`, which is renamed when complete, so that an earlier result is
    kept until then; at a URL, where folders cannot be renamed, they are written directly to their final place.

    Args:
        output: folder or URL.
        resume: whether to keep the blocks written by an interrupted run.
        overwrite: whether to replace an earlier result.

    Raises:
        UserError: if there is an earlier result or an interrupted run, but neither option is set; if there is nothing
            to resume; if the folder has files other than Parquet.
    """

    def __init__(self, output: str, *, resume: bool, overwrite: bool) -> None:
        from maskrcnn.runtime.predictions import PARQUET

        is_local = not is_remote(output)
        base = str(Path(output).absolute()) if is_local else output.rstrip("/")
        self.result = f"{base}/{PARQUET}"
        self.place = f"{self.result}.part" if is_local else self.result
        begun, complete = _parquet_files(self.place), _parquet_files(self.result)
        if not resume and not overwrite and begun:
            raise UserError(
                f"{self.place} has the files of an earlier run",
                "a new folder",
                "continue it with --resume, start again with --overwrite, or choose another --output",
            )
        if not resume and not overwrite and complete is not None:
            raise UserError(f"{self.result} exists", "a new folder", "choose another --output, or use --overwrite")
        if resume and not begun:
            if not complete:
                fix = "leave out --resume"
                raise UserError(f"--resume: no files in {self.place}", "the output of an interrupted run", fix)
            self.place = self.result
        self._is_resumed = resume

    def start(self, names: Collection[str], about: dict[str, Any]) -> dict[str, tuple[int, dict[int, str]]]:
        """Creates the folder; returns the detections and errors of the completed blocks.

        Args:
            names: the files of the run.
            about: model and options of the run.

        Raises:
            UserError: if an interrupted run has another model, other options or other images.
        """
        from maskrcnn.runtime.predictions import read_block

        if not self._is_resumed:
            with file_system(self.place) as (system, path):
                if system.exists(path):
                    system.rm(path, recursive=True)
                system.makedirs(path, exist_ok=True)
            return {}
        files = _parquet_files(self.place) or []
        if other := next((file for file in files if file not in names), None):
            found = f"{self.place} has the results of other images ({other})"
            raise UserError(found, "the images of the interrupted run, in their order", "pass the same images")
        done = {}
        with ThreadPoolExecutor(_READERS) as readers:  # for remote files
            blocks = readers.map(lambda file: read_block(f"{self.place}/{file}"), files)
            for name, block in zip(files, blocks, strict=True):
                if block is not None:
                    _check_same(self.place, block[0], about)
                    done[name] = block[1:]
        return done

    def finish(self, about: dict[str, Any], *, is_empty: bool) -> None:
        """Makes the files the result; a run in which no image could be used leaves nothing."""
        from maskrcnn.files import write_report

        if is_empty:
            with file_system(self.place) as (system, path):
                system.rm(path, recursive=True)
        elif not is_remote(self.place):
            place, result = Path(self.place), Path(self.result)
            for draft in place.glob(".*"):  # left by actors that died
                draft.unlink()
            if place != result:
                if result.exists():
                    shutil.rmtree(result)
                place.rename(result)
            write_report(result.parent / RUN, "predict", {"is_complete": True, **about})


def _parquet_files(folder: str) -> list[str] | None:
    """The names of the files in a folder or at a URL; None if it does not exist.

    Raises:
        UserError: if it has files other than Parquet.
    """
    with file_system(folder) as (system, path):
        system.invalidate_cache()
        if not system.exists(path):
            return None
        names = [] if system.isfile(path) else [each.rpartition("/")[2] for each in system.ls(path, detail=False)]
        if system.isfile(path) or any(name and not name.endswith(".parquet") for name in names):
            raise UserError(f"{folder} has other files", "a folder of Parquet files", "choose another --output")
        return sorted(name for name in names if name and not name.startswith("."))


def _check_same(place: Path | str, before: dict[str, Any], about: dict[str, Any]) -> None:
    """Checks that a continued run uses the model and options that it was started with."""
    for key in ("model_sha256", "backend", "precision", "preprocessing", "tiles"):
        if json.loads(json.dumps(before.get(key))) != json.loads(json.dumps(about[key])):
            found = f"{place} has a run with {key} {before.get(key)}, not {about[key]}"
            raise UserError(found, "the same model and options", "use them, or choose another --output")


def run_facts(detector: Detector, model: Path, tiles: Tiles | None = None) -> dict[str, Any]:
    """The model of a run, and everything else that its detections depend on."""
    return {
        "model": str(model),
        "model_sha256": _digest(model),
        "backend": detector.backend.name,
        "precision": detector.backend.precision,
        "preprocessing": detector.preprocessing.to_dict(),
        "tiles": None if tiles is None else asdict(tiles),
        "categories": _categories(detector.metadata),
    }


def _categories(metadata: ModelMetadata) -> list[dict[str, Any]]:
    """Entries of `categories` in COCO's format."""
    entries: list[dict[str, Any]] = [
        {"id": key, "name": name} for key, name in zip(metadata.category_ids, metadata.class_names, strict=True)
    ]
    if metadata.has_keypoints:
        skeleton = [list(pair) for pair in metadata.keypoint_skeleton]
        entries = [{**each, "keypoints": list(metadata.keypoint_names), "skeleton": skeleton} for each in entries]
    return entries


def _digest(model: Path) -> str:
    """SHA-256 of a model file; for an OpenVINO engine, including its weights."""
    from maskrcnn.metadata import sha256_of

    weights = model.with_suffix(".bin")
    return sha256_of(model) + (f"+{sha256_of(weights)}" if model.suffix == ".xml" and weights.is_file() else "")


def _check_label_names(sources: Sequence[Source]) -> None:
    """Checks that no two images have the same label file, which is named after the image without its suffix."""
    taken: dict[str, str] = {}
    for source in sources:
        first = taken.setdefault(os.path.splitext(os.path.abspath(source.name))[0], source.name)
        if first is not source.name:
            found = f"labels of {first} and {source.name}, which would be one file"
            raise UserError(found, "images whose names differ without suffix", "rename one, or use --save coco")


def _stems(sources: Sequence[Source]) -> list[str]:
    """The name of each source's overlay without suffix: the source's name, numbered if several are equal."""
    stems = [source.stem for source in sources]
    repeated = Counter(stems)
    taken: set[str] = set()
    names = []
    for number, stem in enumerate(stems, start=1):
        name = f"{stem}-{number}" if repeated[stem] > 1 else stem
        while name in taken:
            name += f"-{number}"
        taken.add(name)
        names.append(name)
    return names
