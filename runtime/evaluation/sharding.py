"""Evaluation in several processes, started here or by `torchrun`, that write to a common log of detections.

The log also makes an evaluation resumable. It is a JSON Lines file: the first line identifies the model and the data,
and each further line contains the results of one image. Incomplete lines are ignored, so an interruption loses at most
the last image. Every further process writes its own part in the same folder, `name.1.jsonl`, `name.2.jsonl`, …; the log
is the union of all parts.
"""

from __future__ import annotations

import glob
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.survey import with_exif
from maskrcnn.errors import UserError
from maskrcnn.files import make_folder
from maskrcnn.machine import available_cpus
from maskrcnn.metadata import sha256_of
from maskrcnn.runtime.detector import Detector
from maskrcnn.runtime.evaluation.evaluate import Seconds, batches_of, check_classes, detect_batch, facts_of
from maskrcnn.runtime.tiles import Tiles

_KEY, _VERSION = "maskrcnn_detections", 1
_POLL_S = 0.2
_PATIENCE_S = 1800.0  # maximum time without a new image from any process
_GPUS = Path("/proc/driver/nvidia/gpus")

_Progress = Callable[[int], None]
_ImageResults = tuple[list[dict[str, Any]], Seconds]  # results in COCO's format and the time of one image


@dataclass(frozen=True)
class Origin:
    """The model, data and settings of detections. Detections that differ in any field are not mixed."""

    model: str  # SHA-256 of the file
    backend: str
    annotations: str  # SHA-256 of the file
    batch_size: int  # changes rounding
    reading: str = "auto"  # rule of EXIF orientations, pixel range and tiles, if given; absent in older logs


class DetectionsLog:
    """A log of detections with all its parts.

    Args:
        path: part of the first process; the other parts are in the same folder.
        origin: origin of the detections.
        names: file names by field of `origin`, for error texts.

    Raises:
        UserError: if the path is a folder or a device.
    """

    def __init__(self, path: Path, origin: Origin, names: Mapping[str, str] | None = None) -> None:
        if path.exists() and not path.is_file():
            raise _no_log(path, "a folder" if path.is_dir() else "a device")
        self.path, self.origin, self._names = path, origin, dict(names or {})
        self._counted: dict[Path, tuple[int, int]] = {}  # bytes and lines of each part

    def read(self) -> dict[int, _ImageResults]:
        """Reads all parts and returns the results by image id.

        Raises:
            UserError: for detections of another origin, and for a file that is not a log.
        """
        results: dict[int, _ImageResults] = {}
        for part in self.parts():
            results |= self._read_part(part)[0]
        return results

    def parts(self) -> list[Path]:
        """The existing parts of all processes."""
        others = self.path.parent.glob(f"{glob.escape(self.path.stem)}.*{glob.escape(self.path.suffix)}")
        numbered = [path for path in others if path.name[len(self.path.stem) + 1 :].partition(".")[0].isdigit()]
        return [*([self.path] if self.path.exists() else []), *sorted(numbered)]

    def images(self) -> int:
        """The number of complete and incomplete images: counts only lines that were added since the last call."""
        parts = self.parts()
        for part in parts:
            size, lines = self._counted.get(part, (0, -1))  # without the first line
            if part.stat().st_size < size:
                size, lines = 0, -1
            with open(part, "rb") as file:
                file.seek(size)
                added = file.read()
            self._counted[part] = size + len(added), lines + added.count(b"\n")
        return sum(max(0, self._counted[part][1]) for part in parts)

    def facts(self) -> dict[str, Any]:
        """The facts about the model in the first part; empty before any process has started."""
        for part in self.parts():
            with open(part, "rb") as file:
                header = _entry(file.readline())
            if header is not None:
                return dict(header["facts"])
        return {}

    def open_part(self, rank: int = 0, facts: Mapping[str, Any] | None = None) -> Path:
        """Opens or creates the part of a process for `append`, and removes an incomplete last line.

        Args:
            rank: rank of the process.
            facts: facts about the model, for a new part.

        Raises:
            UserError: see `read`.
        """
        part = self.path.with_name(f"{self.path.stem}.{rank}{self.path.suffix}") if rank else self.path
        make_folder(part.parent)
        end = self._read_part(part)[1] if part.exists() else 0
        with open(part, "ab") as file:
            file.truncate(end)
            if end == 0:
                origin = {"origin": asdict(self.origin), "names": self._names, "facts": dict(facts or {})}
                file.write(_line({_KEY: _VERSION} | origin))
        return part

    def write(
        self, facts: Mapping[str, Any], batches: Iterable[tuple[Sequence[int], Sequence[list[dict[str, Any]]], Seconds]]
    ) -> None:
        """Writes the batches of an incomplete evaluation: image ids, results and time of each batch."""
        part = self.open_part(facts=facts)
        for image_ids, results, seconds in batches:
            self.append(part, image_ids, results, seconds)

    @staticmethod
    def append(part: Path, image_ids: Sequence[int], results: Sequence[list[dict[str, Any]]], seconds: Seconds) -> None:
        """Appends the results of the images of one batch, and the time of the batch, to an opened part."""
        share = [value / len(image_ids) for value in astuple(seconds)]
        lines = [
            _line({"image_id": image_id, "results": own, "seconds": share})
            for image_id, own in zip(image_ids, results, strict=True)
        ]
        with open(part, "ab") as file:
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())

    def _read_part(self, part: Path) -> tuple[dict[int, _ImageResults], int]:
        """The images of a part, and the end of its last complete line."""
        results: dict[int, _ImageResults] = {}
        end = 0
        for number, line in enumerate(part.read_bytes().splitlines(keepends=True)):
            entry = _entry(line)
            if number == 0 and not _is_torn_header(line):
                self._check_header(part, entry)
            if entry is None:
                break
            if number:
                try:
                    results[entry["image_id"]] = entry["results"], Seconds(*entry["seconds"])
                except (KeyError, TypeError) as error:
                    raise _no_log(part, f"line {number + 1} is not an image with its results") from error
            end += len(line)
        return results, end

    def _check_header(self, part: Path, header: Any) -> None:
        if not isinstance(header, dict) or header.get(_KEY) != _VERSION:
            raise _no_log(part, "not a log of detections")
        for field, own in asdict(self.origin).items():
            other = header["origin"].get(field, getattr(Origin, field, None))
            if other != own:
                word = field.replace("_", " ")
                raise UserError(
                    f"{part}: detections of another {word}: {_described(header['names'].get(field), other)}",
                    f"{word} {_described(self._names.get(field), own)}",
                    "pass another file to --resume, or delete this one to start over",
                )


def _no_log(part: Path, what: str) -> UserError:
    return UserError(f"{part}: {what}", "a file that --resume wrote, or a new name", "pass another file to --resume")


def _is_torn_header(line: bytes) -> bool:
    """Whether this first line is an interrupted header of a log."""
    start = _line({_KEY: _VERSION})[:-2]  # without the closing brace and the line end
    return not line.endswith(b"\n") and (line.startswith(start) or start.startswith(line))


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _entry(line: bytes) -> Any:
    """The content of a line; None for an incomplete one."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def _described(name: str | None, value: Any) -> str:
    """Describes a file by its name and the start of its hash; any other value is unchanged."""
    return f"{name} (sha256 {str(value)[:12]}…)" if name else str(value)


@dataclass(frozen=True)
class Share:
    """Rank of this process and number of processes that share the images."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # rank among the processes of this machine

    @classmethod
    def of_environment(cls, variables: Mapping[str, str] = os.environ) -> Share:
        """Reads `torchrun`'s variables; without them, a single process.

        Raises:
            UserError: for invalid values.
        """
        values = {name: variables.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
        values["LOCAL_RANK"] = variables.get("LOCAL_RANK", values["RANK"])
        try:
            share = cls(*(int(value) for value in values.values()))
        except ValueError:
            share = cls(-1)
        if not 0 <= share.rank < share.count or share.local_rank < 0:
            found = f"environment {', '.join(f'{name}={value}' for name, value in values.items())}"
            raise UserError(found, "0 ≤ RANK < WORLD_SIZE", "start with torchrun, or unset them")
        return share


@dataclass(frozen=True)
class DetectionTask:
    """The arguments of an evaluation that other processes need."""

    model: Path
    data: Path
    split: str
    backend: str | None = None
    batch_size: int = 1
    images: Path | None = None  # folder of the images (default: search for it)
    exif: str = "auto"  # one of `images.EXIF_RULES`
    pixel_range: tuple[float, ...] | None = None  # default: the model's
    tiles: Tiles | None = None

    def log(self, path: Path, dataset: CocoDataset) -> DetectionsLog:
        """Returns the log of this task, new or to be continued.

        Raises:
            UserError: if the model does not exist.
        """
        files = [self.model, *([self.model.with_suffix(".bin")] if self.model.suffix == ".xml" else [])]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise UserError(f"no file {missing[0]}", "a checkpoint, an ONNX file or an engine", "check the path")
        origin = Origin(
            model="".join(sha256_of(file) for file in files),
            backend=self.backend or "the default",
            annotations=dataset.fingerprint(),
            batch_size=self.batch_size,
            reading=" ".join(map(str, (self.exif, *(self.pixel_range or ()), *([self.tiles] if self.tiles else [])))),
        )
        return DetectionsLog(path, origin, {"model": str(self.model), "annotations": str(dataset.annotation_path)})


def detect_share(
    detector: Detector,
    dataset: CocoDataset,
    log: DetectionsLog,
    share: Share,
    *,
    tiles: Tiles | None = None,
    progress: _Progress = lambda images: None,
) -> None:
    """Runs the detector on a process's share of the images, without those in the log, and appends the results to it.

    Batches contain the same images for any number of processes and any state of the log.

    Args:
        detector: detector of any backend.
        dataset: the whole dataset.
        log: log of the detections; its origin contains the batch size.
        share: share of this process.
        tiles: detects tile by tile.
        progress: called with the number of images done, including images that the log already has.

    Raises:
        UserError: if the model has other classes, an image cannot be read, or the log has another origin.
    """
    check_classes(detector, dataset)
    done = log.read()
    part = log.open_part(share.rank, facts_of(detector))
    size = log.origin.batch_size
    batches = batches_of(dataset.images, 1 if tiles else size, detector.metadata.preprocessing)
    for batch in batches[share.rank :: share.count]:
        if not all(image_id in done for image_id in batch.ids.tolist()):
            results, seconds = detect_batch(detector, batch, tiles, size)
            log.append(part, batch.ids.tolist(), results, seconds)
        progress(len(batch))


def gathered(
    dataset: CocoDataset,
    log: DetectionsLog,
    *,
    progress: _Progress = lambda images: None,
    patience_s: float = _PATIENCE_S,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[list[dict[str, Any]], Seconds]:
    """Waits until every process has written its share; returns all results in the order of the images, and the time.

    Args:
        dataset: the whole dataset.
        log: log of all processes.
        progress: called with the number of new images.
        patience_s: maximum time without a new image.
        sleep: function that waits.

    Raises:
        UserError: if `patience_s` passes without a new image.
    """
    seen, waited, ids = 0, 0.0, dataset.images.ids.tolist()
    while True:
        now = log.images()
        if now > seen:
            progress(now - seen)
            seen, waited = now, 0.0
        if now >= len(dataset.images):
            by_image = log.read()
            if all(image_id in by_image for image_id in ids):
                break
        if waited > patience_s:
            raise UserError(
                f"{log.path}: {now} of {len(dataset.images)} images, and none for {patience_s:.0f} s",
                "results from every process",
                "look at the other processes' messages, then run the same command again",
            )
        sleep(_POLL_S)
        waited += _POLL_S
    images = [by_image[image_id] for image_id in ids]
    return [result for results, _ in images for result in results], sum((own for _, own in images), Seconds())


def detect_in_processes(
    task: DetectionTask, dataset: CocoDataset, log: DetectionsLog, processes: int, *, progress: _Progress
) -> tuple[list[dict[str, Any]], Seconds]:
    """Starts worker processes that share the images. Each loads the model and uses an equal part of the cores.

    Returns:
        All results in the order of the images, and the time.

    Raises:
        UserError: from a worker, or if a worker process fails without one.
    """
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    shares = [Share(rank, processes, rank) for rank in range(processes)]
    workers = [context.Process(target=_worker, args=(errors, task, log, share), daemon=True) for share in shares]
    for worker in workers:
        worker.start()
    seen = 0
    try:
        while any(worker.is_alive() for worker in workers):
            time.sleep(_POLL_S)
            now = log.images()
            progress(now - seen)
            seen = now
            if any(worker.exitcode for worker in workers):
                break
    finally:
        for worker in workers:
            worker.terminate()  # no effect on a process that has ended
            worker.join()
    if not errors.empty():
        raise errors.get()
    if any(worker.exitcode for worker in workers):
        raise UserError(
            f"a worker process that ended with code {next(w.exitcode for w in workers if w.exitcode)}",
            "worker processes that end normally",
            "see its messages above; if memory ran out, use fewer --processes; --resume keeps what is done",
        )
    return gathered(dataset, log, patience_s=0.0)


def _worker(errors: Any, task: DetectionTask, log: DetectionsLog, share: Share) -> None:
    """Processes one share in a worker process; sends a `UserError` to the parent process."""
    try:
        use_own_gpu(share)
        dataset = with_exif(CocoDataset.load(task.data, task.split, images=task.images), task.exif)
        threads = max(1, available_cpus() // share.count)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before PyTorch is imported
        options = {"threads": threads} if task.model.suffix in (".onnx", ".xml") else {}
        detector = Detector.load(task.model, task.backend, pixel_range=task.pixel_range, **options)
        detect_share(detector, dataset, log, share, tiles=task.tiles)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        own = UserError(
            f"internal error in a worker process, {type(error).__name__}: {error}",
            "a worker process that detects its share",
            "run with --processes 1 to see where; --resume keeps what is done",
        )
        errors.put(error if isinstance(error, UserError) else own)
        sys.exit(1)


def use_own_gpu(share: Share, variables: MutableMapping[str, str] = os.environ, gpus: Path = _GPUS) -> None:
    """Restricts this process to one GPU if it is one of several. Call it before a library looks for GPUs."""
    visible = [name for name in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if "CUDA_VISIBLE_DEVICES" not in variables and gpus.is_dir():
        visible = [str(index) for index in range(len(list(gpus.iterdir())))]
    if share.count > 1 and visible:
        variables["CUDA_VISIBLE_DEVICES"] = visible[share.local_rank % len(visible)]
