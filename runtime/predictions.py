"""Detections of many images on disk: a JSON Lines file, and the files made from it.

`Predictions` appends one line per finished image to `detections.jsonl`, in the order of the images. A killed run leaves
complete lines and at most one partial line, which is removed when the run is resumed. COCO results and Parquet are
written from that file line by line, so memory does not grow with the number of images.

A line is `{"image_id", "file", "height", "width", "detections": […]}`, where an entry of `detections` is a COCO result
with `category_name`. It may have `orientation` (EXIF, if it was applied), and for videos `frame` and `time_s`.
An image that cannot be used has `error` instead of size and detections.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from maskrcnn.data.sources import atomic_file, open_source, pyarrow_parquet
from maskrcnn.errors import UserError, reason_of
from maskrcnn.files import atomic_path, disk_errors

if TYPE_CHECKING:
    from maskrcnn.data.sources import ImageItem
    from maskrcnn.imaging.postprocess import Detections
    from maskrcnn.metadata import ModelMetadata

LINES, RESULTS, IMAGES, PARQUET = "detections.jsonl", "results.json", "images.json", "detections.parquet"
_ROWS = 16384  # per Parquet row group

Record = dict[str, Any]  # a line of `detections.jsonl`


class Predictions:
    """The file `detections.jsonl` of a run, open for appending.

    Args:
        path: the file; a partial last line is removed.
        keep: number of lines of an existing file to keep.

    Raises:
        UserError: if it cannot be written.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        with disk_errors(path):
            self._file: IO[bytes] = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (see `close`)
            for _ in range(keep):
                self._file.readline()
            self._file.truncate()

    def append(self, record: str) -> None:
        """Writes the JSON of an image. After return, it is kept even if this process is killed.

        Raises:
            UserError: if the disk is full; earlier lines stay complete.
        """
        with disk_errors(self.path):
            end = self._file.tell()
            try:
                self._file.write(f"{record}\n".encode("utf-8", "backslashreplace"))
                self._file.flush()
            except OSError:
                self._file.seek(end)
                self._file.truncate()
                raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def record_of(
    item: ImageItem, image_id: int, orientation: int, detections: Detections, metadata: ModelMetadata
) -> Record:
    """The record of an image; see the top of this module.

    Args:
        item: the image.
        image_id: image id in the dataset.
        orientation: the EXIF orientation that was applied, 1 for none.
        detections: detections in the image.
        metadata: metadata of the model.
    """
    class_of = dict(zip(metadata.category_ids, metadata.class_names, strict=True))
    height, width = detections.size_hw
    record: Record = {"image_id": image_id, "file": item.name, "height": height, "width": width}
    if orientation != 1:
        record["orientation"] = orientation
    if item.frame is not None:
        record |= {"frame": item.frame.index, "time_s": item.frame.time_s}
    entries = detections.to_coco(image_id)
    record["detections"] = [{**entry, "category_name": class_of[entry["category_id"]]} for entry in entries]
    return record


def read_predictions(path: Path) -> Iterator[Record]:
    """Yields the complete lines of `detections.jsonl`, without a partial last line.

    Raises:
        UserError: if the file cannot be read, or a line before the last is damaged.
    """
    number, faulty = 0, ""
    with disk_errors(path), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if faulty:
                break
            try:
                record = json.loads(line)
                if not line.endswith(b"\n") or not isinstance(record, dict) or "image_id" not in record:
                    raise ValueError("not an object with image_id")
            except ValueError as error:
                faulty = f"line {number}: {reason_of(error)}"
                continue
            yield record
        else:
            return
    raise UserError(f"{path}, {faulty}", "lines of JSON, as `maskrcnn predict` writes them", "restore the file")


def write_results(lines: Path, path: Path) -> None:
    """Writes all detections as COCO results."""
    with atomic_path(path) as draft, open(draft, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("[")
        separator = "\n"
        for record in read_predictions(lines):
            for entry in record.get("detections", ()):
                file.write(separator + json.dumps(entry, ensure_ascii=False))
                separator = ",\n"
        file.write("\n]\n")


def write_images(lines: Path, path: Path) -> None:
    """Writes the file name of each image id, including images that could not be used."""
    with atomic_path(path) as draft, open(draft, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("{")
        separator = "\n"
        for record in read_predictions(lines):
            name = json.dumps(record["file"], ensure_ascii=False)
            file.write(f'{separator}  "{record["image_id"]}": {name}')
            separator = ",\n"
        file.write("\n}\n")


def write_parquet(records: Iterable[Record], path: Path | str, about: dict[str, Any]) -> int:
    """Writes one row per detection, see `rows_of`. On failure no file is written.

    Args:
        records: records of the images.
        path: file or URL to write to.
        about: model and preprocessing, for the metadata of the file.

    Returns:
        The number of rows.

    Raises:
        UserError: if pyarrow is missing, or the file cannot be written.
    """
    arrow, parquet = pyarrow_parquet()
    schema = parquet_schema(about)
    rows = (row for record in records for row in rows_of(record))
    count = 0
    with atomic_file(str(path)) as draft, parquet.ParquetWriter(draft, schema, compression="zstd") as writer:
        while group := list(islice(rows, _ROWS)):
            writer.write_table(arrow.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count


def parquet_schema(about: dict[str, Any]) -> Any:
    """The pyarrow schema: the columns of `rows_of`, and metadata under the key "maskrcnn" (JSON)."""
    arrow, _ = pyarrow_parquet()
    numbers = arrow.list_(arrow.float64())
    columns = {
        "image_id": arrow.int64(),
        "file": arrow.string(),
        "height": arrow.int32(),
        "width": arrow.int32(),
        "frame": arrow.int32(),
        "category_id": arrow.int64(),
        "category_name": arrow.string(),
        "score": arrow.float64(),
        "bbox": numbers,
        "counts": arrow.string(),
        "keypoints": numbers,
        "keypoint_scores": numbers,
        "error": arrow.string(),
    }
    return arrow.schema(columns, metadata={"maskrcnn": json.dumps(about)})


def rows_of(record: Record) -> list[dict[str, Any]]:
    """The rows of an image: `bbox` is x, y, width, height in pixels, `counts` the mask's run lengths as in COCO.

    An image that cannot be used has one row with `error`, without a score.
    """
    # Parquet text is UTF-8: invalid bytes in a file name are escaped.
    texts = {key: record[key] for key in ("file", "error") if key in record}
    record = {**record, **{key: text.encode("utf-8", "backslashreplace").decode() for key, text in texts.items()}}
    if "error" in record:
        return [{key: record[key] for key in ("image_id", "file", "error")}]
    shared = {key: record.get(key) for key in ("image_id", "file", "height", "width", "frame")}
    return [
        {
            **shared,
            **{key: entry.get(key) for key in ("category_id", "category_name", "score", "bbox")},
            "counts": entry["segmentation"]["counts"] if "segmentation" in entry else None,
            **{key: entry.get(key) for key in ("keypoints", "keypoint_scores")},
        }
        for entry in record.get("detections", ())
    ]


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Reads the COCO results from a file of `write_parquet`, or from the files in a folder.

    Raises:
        UserError: if pyarrow is missing, or a file was not written by `write_parquet`.
    """
    _, parquet = pyarrow_parquet()
    try:
        table = parquet.read_table(path)
        rows = table.select([each for each in parquet_schema({}).names if each in table.column_names]).to_pylist()
    except (OSError, ValueError) as error:
        expected = "detections in Parquet, as `maskrcnn predict --save parquet` writes them"
        raise UserError(f"{path} cannot be read ({reason_of(error)})", expected, "restore the file") from error
    entries = []
    for row in rows:
        if row.get("score") is None:  # an image that could not be used
            continue
        entry = {key: row[key] for key in ("image_id", "category_id", "score", "bbox") if key in row}
        if row.get("counts") is not None:
            entry["segmentation"] = {"size": [row["height"], row["width"]], "counts": row["counts"]}
        entry |= {key: row[key] for key in ("keypoints", "keypoint_scores") if row.get(key) is not None}
        entries.append(entry)
    return entries


def read_block(path: str) -> tuple[dict[str, Any], int, dict[int, str]] | None:
    """Reads the metadata of a file of `write_parquet`, its number of detections, and its errors by image id.

    Args:
        path: file or URL.

    Returns:
        None for a file that is damaged or incomplete.
    """
    _, parquet = pyarrow_parquet()
    with open_source(path) as file:
        try:
            table = parquet.ParquetFile(file)
            about = json.loads(table.schema_arrow.metadata[b"maskrcnn"])
            rows = table.read(["image_id", "error"]).to_pylist()
        except (OSError, ValueError, KeyError, TypeError):
            return None
    failed = {row["image_id"]: row["error"] for row in rows if row["error"] is not None}
    return about, len(rows) - len(failed), failed
