"""An evaluation shared by several processes, of one command or of `torchrun`; they meet in files alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.files import make_folder
from maskrcnn.metadata import sha256_of
from maskrcnn.runtime.detector import Detector
from maskrcnn.runtime.evaluation.evaluate import Seconds, batches_of, check_classes, detect_batch, facts_of

# A file of detections that grows image by image, so that an evaluation can be interrupted and shared.
#
# The first line says what was detected with and on; each further line holds one image. A line counts once it is whole,
# so whatever an interruption leaves of the last one is dropped. Several processes each write a part of their own beside
# the file, `name.1.jsonl`, `name.2.jsonl` …; what counts is what all parts hold together.

_KEY, _VERSION = "maskrcnn_detections", 1


@dataclass(frozen=True)
class Origin:
    """What detections were made with and on: two that differ in any field are not mixed."""

    model: str  # SHA-256 of the file
    backend: str
    annotations: str  # SHA-256 of the file
    batch_size: int  # images of mixed sizes are padded to the largest of a batch, which changes them a little


@dataclass(frozen=True)
class _ImageDetections:
    """What a log holds of one image."""

    results: list[dict[str, Any]]  # COCO's format
    seconds: Seconds


class DetectionsLog:
    """A log with all its parts.

    Args:
        path: of the first process's part; the others lie beside it.
        origin: of the detections.
        names: of the origin's files, for messages.
    """

    def __init__(self, path: Path, origin: Origin, names: Mapping[str, str] | None = None) -> None:
        self.path, self.origin, self.names = path, origin, dict(names or {})
        self._counted: dict[Path, tuple[int, int]] = {}  # bytes and lines of each part

    def read(self) -> dict[int, _ImageDetections]:
        """What all parts hold, by image id.

        Raises:
            UserError: for detections of another origin, and for a file that is something else.
        """
        found: dict[int, _ImageDetections] = {}
        for part in self.parts():
            found |= self._read_part(part)[0]
        return found

    def parts(self) -> list[Path]:
        """The files there are: of the first process and of the others."""
        others = self.path.parent.glob(f"{_escaped(self.path.stem)}.*{_escaped(self.path.suffix)}")
        numbered = [path for path in others if path.name[len(self.path.stem) + 1 :].partition(".")[0].isdigit()]
        return [*([self.path] if self.path.exists() else []), *sorted(numbered)]

    def part(self, rank: int) -> Path:
        """The file of a process."""
        return self.path.with_name(f"{self.path.stem}.{rank}{self.path.suffix}") if rank else self.path

    def images(self) -> int:
        """About how many images there are: lines, counted from where the last count ended."""
        parts = self.parts()
        for part in parts:
            size, lines = self._counted.get(part, (0, -1))  # the first line is no image
            if part.stat().st_size < size:
                size, lines = 0, -1
            with open(part, "rb") as file:
                file.seek(size)
                added = file.read()
            self._counted[part] = size + len(added), lines + added.count(b"\n")
        return sum(max(0, self._counted[part][1]) for part in parts)

    def facts(self) -> dict[str, Any]:
        """What the writers said of the model; nothing before any has begun."""
        for part in self.parts():
            with open(part, "rb") as file:
                header = _entry(file.readline())
            if header is not None:
                return header["facts"]
        return {}

    def writer(self, rank: int = 0, facts: Mapping[str, Any] | None = None) -> _LogWriter:
        """Goes on with the part of a process, behind its last whole line.

        Args:
            rank: of the process.
            facts: about the model, for `facts`; they may differ.

        Raises:
            UserError: see `read`.
        """
        part = self.part(rank)
        make_folder(part.parent)
        end = self._read_part(part)[1] if part.exists() else 0
        header = {_KEY: _VERSION, "origin": asdict(self.origin), "names": self.names, "facts": dict(facts or {})}
        return _LogWriter(part, end, header)

    def _read_part(self, part: Path) -> tuple[dict[int, _ImageDetections], int]:
        """The images of a part, and where its last whole line ends."""
        found: dict[int, _ImageDetections] = {}
        end = 0
        for number, line in enumerate(part.read_bytes().splitlines(keepends=True)):
            entry = _entry(line)
            if number == 0 and not _is_torn_header(line):
                self._check_header(part, entry)
            if entry is None:
                break
            if number:
                try:
                    found[entry["image_id"]] = _ImageDetections(entry["results"], Seconds(*entry["seconds"]))
                except (KeyError, TypeError) as error:
                    raise _no_log(part, f"line {number + 1} is no image with its results") from error
            end += len(line)
        return found, end

    def _check_header(self, part: Path, header: Any) -> None:
        if not isinstance(header, dict) or header.get(_KEY) != _VERSION:
            raise _no_log(part, "not a log of detections")
        for field, mine in asdict(self.origin).items():
            theirs = header["origin"].get(field)
            if theirs != mine:
                word = field.replace("_", " ")
                raise UserError(
                    f"{part}: detections of another {word}: {_named(header['names'].get(field), theirs)}",
                    f"{word} {_named(self.names.get(field), mine)}",
                    "name another file for --resume, or delete this one to begin anew",
                )


class _LogWriter:
    """Adds images to one part of a log; see `DetectionsLog.writer`."""

    def __init__(self, path: Path, end: int, header: dict[str, Any]) -> None:
        self.path = path
        with open(path, "ab") as file:
            file.truncate(end)
            if end == 0:
                file.write(_line(header))

    def add(self, image_ids: Sequence[int], results: Sequence[list[dict[str, Any]]], seconds: Seconds) -> None:
        """The results of the images of one batch, and the time that the batch took."""
        share = astuple(seconds.shared(len(image_ids)))
        lines = [
            _line({"image_id": image_id, "results": own, "seconds": share})
            for image_id, own in zip(image_ids, results, strict=True)
        ]
        with open(self.path, "ab") as file:
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())


def _no_log(part: Path, what: str) -> UserError:
    return UserError(f"{part}: {what}", "a file that --resume wrote, or a new name", "name another file for --resume")


def _is_torn_header(line: bytes) -> bool:
    """Whether this first line is ours, interrupted while it was written."""
    begin = _line({_KEY: _VERSION})[:-2]  # without the closing brace and the line's end
    return not line.endswith(b"\n") and (line.startswith(begin) or begin.startswith(line))


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _entry(line: bytes) -> Any:
    """The content of a line, None where it is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def _named(name: str | None, value: Any) -> str:
    """A file by its name and the beginning of its hash, anything else as it is."""
    return f"{name} (sha256 {str(value)[:12]}…)" if name else str(value)


def _escaped(text: str) -> str:
    """Text that a glob pattern takes literally."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


_POLL_S = 0.2
_PATIENCE_S = 1800.0  # without a new image from any process
_GPUS = Path("/proc/driver/nvidia/gpus")

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among the processes of this machine

    @classmethod
    def of_environment(cls, variables: Mapping[str, str] = os.environ) -> Share:
        """As `torchrun` tells it; without its variables, everything.

        Raises:
            UserError: for variables that make no sense.
        """
        texts = {name: variables.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
        texts["LOCAL_RANK"] = variables.get("LOCAL_RANK", texts["RANK"])
        named = ", ".join(f"{name}={text}" for name, text in texts.items())
        try:
            share = cls(*(int(text) for text in texts.values()))
        except ValueError:
            share = cls(-1)
        if not 0 <= share.rank < share.count or share.local_rank < 0:
            raise UserError(f"environment {named}", "0 ≤ RANK < WORLD_SIZE", "start with torchrun, or unset them")
        return share


@dataclass(frozen=True)
class DetectionTask:
    """What is detected with what: everything that another process needs to know."""

    model: Path
    data: Path
    split: str
    backend: str | None = None
    batch_size: int = 1

    def log(self, path: Path, dataset: CocoDataset) -> DetectionsLog:
        """The log of this task, new or to be continued.

        Raises:
            UserError: where there is no such model.
        """
        files = [self.model, *([self.model.with_suffix(".bin")] if self.model.suffix == ".xml" else [])]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise UserError(f"no file {missing[0]}", "a checkpoint, an ONNX file or an engine", "check the path")
        origin = Origin(
            model="".join(sha256_of(file) for file in files),
            backend=self.backend or "the default",
            annotations=sha256_of(dataset.annotation_path),
            batch_size=self.batch_size,
        )
        return DetectionsLog(path, origin, {"model": str(self.model), "annotations": str(dataset.annotation_path)})


def detect_share(
    detector: Detector,
    dataset: CocoDataset,
    log: DetectionsLog,
    share: Share,
    *,
    progress: Progress = lambda images: None,
) -> None:
    """Adds to the log what is missing of a process's share of the images.

    A batch is always the same images, however many processes there are and whatever is done already.

    Args:
        detector: any backend.
        dataset: all of it.
        log: for the detections; its origin has the batch size.
        share: the part to do.
        progress: called with the number of images done, at once with those that the log has.

    Raises:
        UserError: when the model was trained on other classes, an image cannot be read, or the log is of something
            else.
    """
    check_classes(detector, dataset)
    done = log.read()
    writer = log.writer(share.rank, facts_of(detector))
    for batch in batches_of(dataset.images, log.origin.batch_size)[share.rank :: share.count]:
        if not all(record.id in done for record in batch):
            results, seconds = detect_batch(detector, batch)
            writer.add([record.id for record in batch], results, seconds)
        progress(len(batch))


def gathered(
    dataset: CocoDataset,
    log: DetectionsLog,
    *,
    progress: Progress = lambda images: None,
    patience_s: float = _PATIENCE_S,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[list[dict[str, Any]], Seconds]:
    """All results in the order of the images, once every process has written its share.

    Args:
        dataset: all of it.
        log: that all processes write to.
        progress: called with the number of images that have come.
        patience_s: how long nothing new may come.
        sleep: pauses.

    Raises:
        UserError: when that takes too long.
    """
    seen, waited = 0, 0.0
    while True:
        now = log.images()
        if now > seen:
            progress(now - seen)
            seen, waited = now, 0.0
        if now >= len(dataset.images):
            found = log.read()
            if all(record.id in found for record in dataset.images):
                break
        if waited > patience_s:
            raise UserError(
                f"{log.path}: {now} of {len(dataset.images)} images, and none for {patience_s:.0f} s",
                "every process to add its share",
                "look at the other processes' messages, then run the same command again",
            )
        sleep(_POLL_S)
        waited += _POLL_S
    results = [result for record in dataset.images for result in found[record.id].results]
    return results, sum((found[record.id].seconds for record in dataset.images), Seconds())


def detect_in_processes(
    task: DetectionTask, dataset: CocoDataset, log: DetectionsLog, processes: int, *, progress: Progress
) -> tuple[list[dict[str, Any]], Seconds]:
    """All results, found by so many processes; each loads the model and takes its part of the cores.

    Raises:
        UserError: what a process raises, and when one ends without a word.
    """
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    shares = [Share(rank, processes, rank) for rank in range(processes)]
    workers = [context.Process(target=_told, args=(errors, task, log, share), daemon=True) for share in shares]
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
            worker.terminate()  # nothing to a process that has ended
            worker.join()
    if not errors.empty():
        raise errors.get()
    if any(worker.exitcode for worker in workers):
        raise UserError(
            f"a process that ended with code {next(w.exitcode for w in workers if w.exitcode)}",
            "processes that live to the end",
            "see above for its last words; for want of memory take fewer --processes; --resume keeps what is done",
        )
    return gathered(dataset, log, patience_s=0.0)


def _told(errors: Any, *work: Any) -> None:
    """One process's part, in that process; what a user can mend goes to the first process."""
    try:
        _work(*work)
    except UserError as error:
        errors.put(error)
        sys.exit(1)


def _work(task: DetectionTask, log: DetectionsLog, share: Share) -> None:
    use_own_gpu(share)
    dataset = CocoDataset.load(task.data, task.split)
    threads = max(1, (os.cpu_count() or 1) // share.count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # PyTorch reads it as it is loaded
    options = {"threads": threads} if task.model.suffix in (".onnx", ".xml") else {}
    detect_share(Detector.load(task.model, task.backend, **options), dataset, log, share)


def use_own_gpu(share: Share, variables: Any = os.environ, gpus: Path = _GPUS) -> None:
    """Shows this process one of the machine's GPUs, if it shares the machine; before any library looks for them."""
    visible = [name for name in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if "CUDA_VISIBLE_DEVICES" not in variables and gpus.is_dir():
        visible = [str(index) for index in range(len(list(gpus.iterdir())))]
    if share.count > 1 and visible:
        variables["CUDA_VISIBLE_DEVICES"] = visible[share.local_rank % len(visible)]
