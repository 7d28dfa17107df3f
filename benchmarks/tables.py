"""Update the tables of docs/results.md from the committed JSON in benchmarks/results/.

    python benchmarks/tables.py [--check]

A table is the text between the comments `<!-- table: FILE.json -->` and `<!-- end -->`, followed by the machine,
versions and commit in the file. `<!-- summary: FILE.json FILE.json -->` shows results of `benchmarks/run.py` side by
side: first size, batch 1, speed relative to torchvision, with an asterisk where the detections differ from FP32's, and
mask AP. With --check nothing is written, and the exit code is 1 if a table differs from its file. The text around the
tables is written by hand. Charts of AP against latency are drawn beside their files, `FILE.svg`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evaluation
import report
import scaling
import stages
from measure import Measurement
from session import aligned
from timing import machine

_ROOT = Path(__file__).resolve().parents[1]
RESULTS = _ROOT / "benchmarks" / "results"
PAGE = _ROOT / "docs" / "results.md"
_INEXACT = "detections that differ from FP32's beyond the tolerance"
_INEXACT_RANDOM = f"\\* random weights: {_INEXACT}; the columns of the trained model show the cost in AP."
_INEXACT_TRAINED = f"\\* trained weights: {_INEXACT}; the AP columns show the cost."
_BLOCK = re.compile(r"(<!-- (table|summary): (\S[^\n]*\S) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)


def rewritten(text: str, results: Path = RESULTS) -> str:
    """Return a page with its tables rendered from their files.

    Raises:
        FileNotFoundError: if the file of a table does not exist.
        ValueError: for an unknown kind of file.
    """

    def block(match: re.Match[str]) -> str:
        contents = [json.loads((results / name).read_text(encoding="utf-8")) for name in match[3].split()]
        text = summary(contents) if match[2] == "summary" else _rendered(contents[0])
        return f"{match[1]}{text}\n{match[5]}"

    return _BLOCK.sub(block, text)


def files_of(text: str) -> list[str]:
    """Return the files of a page's tables."""
    return [name for match in _BLOCK.finditer(text) for name in match[3].split()]


def chart(content: Any) -> str | None:
    """Draw AP against latency from results of `benchmarks/run.py`; None without AP."""
    is_latency = isinstance(content, dict) and "p50_ms" in (content.get("rows") or [{}])[0]
    return report.ap_chart([Measurement(**row) for row in content["rows"]]) if is_latency else None


def summary(contents: Sequence[dict[str, Any]]) -> str:
    """Format results of `benchmarks/run.py` side by side: a row per backend and precision, columns for each result.

    The columns are, for the first size and batch 1: median milliseconds from image to masks, speed relative to
    torchvision in the same run, and mask AP if it was measured, as a difference except for the reference. Below the
    table, asterisks at ratios are explained.
    """
    columns = [("ms", _value("p50_ms", ".0f")), ("× torchvision", _marked_ratio), ("mask AP", _ap("mask_ap"))]
    heads, found, notes = ["run by"], {}, []
    for content in contents:
        rows = [row for row in content["rows"] if row["p50_ms"] is not None and row["batch"] == 1]
        rows = [row for row in rows if row["size"] == rows[0]["size"]]
        shown = [(name, show) for name, show in columns if any(show(row) for row in rows)]
        for row in rows:
            runner = f"{row['model']}, {row['backend']}" if row["peer"] else f"{row['backend']}, {row['precision']}"
            known = found.setdefault(runner, [])
            known += [""] * (len(heads) - 1 - len(known)) + [show(row) for _, show in shown]
        heads += [f"{content['workload']['name'].split(',')[0]}: {shown[0][0]}", *(name for name, _ in shown[1:])]
        if any("*" in _marked_ratio(row) for row in rows):
            notes.append(_INEXACT_RANDOM if "random weights" in content["workload"]["name"] else _INEXACT_TRAINED)
    lines = [[runner, *cells, *[""] * (len(heads) - 1 - len(cells))] for runner, cells in found.items()]
    return "\n\n".join([aligned(heads, lines), *dict.fromkeys(notes)])


def _rendered(content: Any) -> str:
    """Format the table of a result file, and its machine.

    Raises:
        ValueError: for an unknown kind of file.
    """
    for is_kind, render in _KINDS:
        if is_kind(content):
            text = render(content)
            lines = machine(content["environment"]) if isinstance(content, dict) else []
            return "\n".join([text, "", *lines]) if lines else text
    raise ValueError(
        "found: an unknown kind of result; expected: a file of benchmarks/; fix: add its kind to tables.py"
    )


def _latency(content: dict[str, Any]) -> str:
    rows = [row for row in content["rows"] if row["p50_ms"] is not None]
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("file", lambda row: row["model"]),
        ("backend", lambda row: f"{row['backend']}, {row['precision']}"),
        ("size", lambda row: row.get("size", "")),
        ("batch", lambda row: str(row["batch"])),
        ("p50 ms", _value("p50_ms", ".1f")),
        ("p90 ms", _value("p90_ms", ".1f")),
        ("× torchvision", _value("times_torchvision", ".2f")),
        ("× its ONNX", _value("times_torchvision_onnx", ".2f")),
        ("box AP", _ap("box_ap")),
        ("mask AP", _ap("mask_ap")),
        ("keypoint AP", _ap("keypoint_ap")),
        ("host MB", _value("host_mb", ".0f")),
        ("GPU MB", _value("device_mb", ".0f")),
        ("file MB", _value("file_mb", ".0f")),
        ("build s", _value("build_s", ".0f")),
        ("check", lambda row: row["status"] if row["status"] != "ok" else ""),
    ]
    text = _table(columns, rows)
    split = [row for row in rows if row.get("split_ms")]
    if split:
        parts = list(split[0]["split_ms"])
        parts += [part for row in split for part in row["split_ms"] if part not in parts]
        columns = [*columns[:4], *((f"{part} ms", _part(part)) for part in parts)]
        text += "\n\nTime of the parts of a call:\n\n" + _table(columns, split)
    return text


def _marked_ratio(row: dict[str, Any]) -> str:
    """Speed relative to torchvision, with an asterisk where the detections differ from FP32's."""
    text = _value("times_torchvision", ".1f")(row)
    return f"{text} *" if text and row["status"] == "inexact" else text


def _part(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row['split_ms'][name]:.2f}" if name in row["split_ms"] else ""


def _value(name: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "" if row.get(name) is None else format(row[name], form)


def _ap(name: str) -> Callable[[dict[str, Any]], str]:
    """AP of the reference, and difference to it of the others."""

    def show(row: dict[str, Any]) -> str:
        if row.get(name) is None:
            return ""
        return f"{row[name]:.4f}" if row["check"] == "reference" else f"{row[f'{name}_difference']:+.4f}"

    return show


def _table(columns: Sequence[tuple[str, Callable[[dict[str, Any]], str]]], rows: Sequence[dict[str, Any]]) -> str:
    """Format a table without its empty columns."""
    shown = [(name, show) for name, show in columns if any(show(row) for row in rows)]
    return aligned([name for name, _ in shown], [[show(row) for _, show in shown] for row in rows])


def _ops(content: dict[str, Any]) -> str:
    columns = [
        ("case", lambda row: row["case"]),
        ("contender", lambda row: row["contender"]),
        ("measured as", lambda row: row["how"]),
        ("p50 µs", _value("p50_us", ".1f")),
        ("× torchvision", _value("speedup", ".2f")),
        ("of copy bandwidth", _value("of_copy_bandwidth", ".0%")),
    ]
    return _table(columns, content["rows"])


def _evaluation(content: dict[str, Any]) -> str:
    return evaluation.table([evaluation.Row(**row) for row in content["rows"]])


def _scaling(content: dict[str, Any]) -> str:
    return "\n\n".join(f"{curve['title']}:\n\n{scaling.table(curve)}" for curve in content["curves"].values())


def _training(content: dict[str, Any]) -> str:
    rows = [{**report, **row} for report in content["reports"] for row in report["rows"] if row["p50_s"] is not None]
    columns = [
        ("model", lambda row: row["model"]),
        ("batch", lambda row: f"{row['batch']} × {row['size_hw'][0]}×{row['size_hw'][1]}"),
        ("trainer", lambda row: f"{row['trainer']}, {row['precision']}"),
        ("p50 s", _value("p50_s", ".3f")),
        ("images/s", _value("images_per_s", ".2f")),
        ("× torchvision", _ratio),
        ("peak MB", _value("peak_memory_mb", ".0f")),
        ("synchronisations", _value("synchronisations", "d")),
    ]
    return _table(columns, rows)


def _ratio(row: dict[str, Any]) -> str:
    if row["trainer"] == "torchvision":
        return "1"
    return "{times_torchvision:.2f} ({times_torchvision_p10:.2f}–{times_torchvision_p90:.2f})".format(**row)


def _matrix(content: dict[str, Any]) -> str:
    columns = [
        ("model", lambda row: row["model"]),
        ("images", lambda row: row["kind"]),
        ("cells", _value("cells", "d")),
        ("detections", _value("detections", "d")),
        ("unpaired", _value("unpaired", "d")),
        ("boxes px", _value("box_px", ".1e")),
        ("scores", _value("score", ".1e")),
        ("masks", _value("mask", ".1e")),
        ("keypoints px", lambda row: f"{row['keypoints']['px']:.1e}" if row.get("keypoints") else ""),
    ]
    return _table(columns, content["rows"])


def _stages(content: list[dict[str, Any]]) -> str:
    return stages.table([stages.Split(**split) for split in content])


_KINDS: list[tuple[Callable[[Any], bool], Callable[[Any], str]]] = [
    (lambda content: isinstance(content, list), _stages),
    (lambda content: "curves" in content, _scaling),
    (lambda content: "reports" in content, _training),
    (lambda content: "cells" in content, _matrix),
    (lambda content: "work" in (content.get("rows") or [{}])[0], _evaluation),
    (lambda content: "contender" in (content.get("rows") or [{}])[0], _ops),
    (lambda content: "p50_ms" in (content.get("rows") or [{}])[0], _latency),
]


def main() -> int:
    """Update the page, or report that it is outdated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="do not write; exit code 1 if a table is outdated")
    given = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    new = rewritten(text)
    if given.check:
        print(f"{PAGE.name}: {'up to date' if new == text else 'outdated; run python benchmarks/tables.py'}")
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    for name in dict.fromkeys(files_of(text)):
        if drawn := chart(json.loads((RESULTS / name).read_text(encoding="utf-8"))):
            (RESULTS / name).with_suffix(".svg").write_text(drawn, encoding="utf-8")
    print(f"{PAGE}: from {len(files_of(text))} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
