"""The tables of docs/results.md and README.md, written from the committed JSON of benchmarks/results/.

    python benchmarks/tables.py [--check]

A table stands between two comments, `<!-- table: FILE.json -->` and `<!-- end -->`, and below it machine, versions
and the commit that the file names. `<!-- summary: FILE.json FILE.json -->` puts results of `benchmarks/run.py` side by
side: first size, batch 1, how many times torchvision's speed, with an asterisk where the detections are not FP32's, and
mask AP. What lies between is rewritten; with --check nothing is, and exit code 1 says that a table is not what its file
gives. Sentences around the tables are written by hand.
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
import scaling
import stages
from report import aligned, machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
PAGES = (PAGE, ROOT / "README.md")
_INEXACT = "kept detections differ from FP32's beyond the tolerance; what a precision costs in AP is in the columns"
_INEXACT_RANDOM = f"\\* random weights: {_INEXACT} of the trained model."
_INEXACT_TRAINED = f"\\* trained weights: {_INEXACT} beside it."
_BLOCK = re.compile(r"(<!-- (table|summary): (\S[^\n]*\S) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)


def rewritten(text: str, results: Path = RESULTS) -> str:
    """A page with its tables as the files give them.

    Raises:
        FileNotFoundError: for a table whose file is not there.
        ValueError: for a file of no known kind.
    """

    def block(match: re.Match) -> str:
        contents = [json.loads((results / name).read_text(encoding="utf-8")) for name in match[3].split()]
        text = summary(contents) if match[2] == "summary" else _rendered(contents[0])
        return f"{match[1]}{text}\n{match[5]}"

    return _BLOCK.sub(block, text)


def files_of(text: str) -> list[str]:
    """The files that a page's tables are made of."""
    return [name for match in _BLOCK.finditer(text) for name in match[3].split()]


def summary(contents: Sequence[dict[str, Any]]) -> str:
    """Results of `benchmarks/run.py` side by side, a row for each way to run the model and columns for each result.

    Of each result the rows of its first size and batch 1: milliseconds from image to masks (the median), how many times
    torchvision's speed in the same run, and mask AP where one was measured, of all but the reference as a difference.
    Below the table, what an asterisk at a ratio means, if there is one.
    """
    figures = [("ms", _figure("p50_ms", ".0f")), ("× torchvision", _marked_ratio), ("mask AP", _ap("mask_ap"))]
    heads, found, notes = ["run by"], {}, []
    for content in contents:
        rows = [row for row in content["rows"] if row["p50_ms"] is not None and row["batch"] == 1]
        rows = [row for row in rows if row["size"] == rows[0]["size"]]
        shown = [(name, show) for name, show in figures if any(show(row) for row in rows)]
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
    """The table of a result file, and where it was measured.

    Raises:
        ValueError: for a file of no known kind.
    """
    for is_kind, render in _KINDS:
        if is_kind(content):
            text = render(content)
            lines = machine(content["environment"]) if isinstance(content, dict) else []
            return "\n".join([text, "", *lines]) if lines else text
    raise ValueError(
        "found: a result of no known kind; expected: a file of benchmarks/; fix: add its kind to tables.py"
    )


def _latency(content: dict[str, Any]) -> str:
    rows = [row for row in content["rows"] if row["p50_ms"] is not None]
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("file", lambda row: row["model"]),
        ("backend", lambda row: f"{row['backend']}, {row['precision']}"),
        ("size", lambda row: row.get("size", "")),
        ("batch", lambda row: str(row["batch"])),
        ("p50 ms", _figure("p50_ms", ".1f")),
        ("p90 ms", _figure("p90_ms", ".1f")),
        ("× torchvision", _figure("times_torchvision", ".2f")),
        ("× its ONNX", _figure("times_torchvision_onnx", ".2f")),
        ("box AP", _ap("box_ap")),
        ("mask AP", _ap("mask_ap")),
        ("keypoint AP", _ap("keypoint_ap")),
        ("host MB", _figure("host_mb", ".0f")),
        ("GPU MB", _figure("device_mb", ".0f")),
        ("file MB", _figure("file_mb", ".0f")),
        ("build s", _figure("build_s", ".0f")),
        ("check", lambda row: row["status"] if row["status"] != "ok" else ""),
    ]
    text = _table(columns, rows)
    split = [row for row in rows if row.get("split_ms")]
    if split:
        parts = list(split[0]["split_ms"])
        parts += [part for row in split for part in row["split_ms"] if part not in parts]
        columns = [*columns[:4], *((f"{part} ms", _part(part)) for part in parts)]
        text += "\n\nWhere the time of such a call goes:\n\n" + _table(columns, split)
    return text


def _marked_ratio(row: dict) -> str:
    """How many times torchvision's speed, with an asterisk where the detections are not FP32's."""
    text = _figure("times_torchvision", ".1f")(row)
    return f"{text} *" if text and row["status"] == "inexact" else text


def _part(name: str) -> Callable[[dict], str]:
    return lambda row: f"{row['split_ms'][name]:.2f}" if name in row["split_ms"] else ""


def _figure(name: str, form: str) -> Callable[[dict], str]:
    return lambda row: "" if row.get(name) is None else format(row[name], form)


def _ap(name: str) -> Callable[[dict], str]:
    """The AP of the reference, and of the others the difference to it."""

    def show(row: dict) -> str:
        if row.get(name) is None:
            return ""
        return f"{row[name]:.4f}" if row["check"] == "reference" else f"{row[f'{name}_difference']:+.4f}"

    return show


def _table(columns: Sequence[tuple[str, Callable[[dict], str]]], rows: Sequence[dict]) -> str:
    """Only columns in which something stands."""
    shown = [(name, show) for name, show in columns if any(show(row) for row in rows)]
    return aligned([name for name, _ in shown], [[show(row) for _, show in shown] for row in rows])


def _ops(content: dict[str, Any]) -> str:
    columns = [
        ("case", lambda row: row["case"]),
        ("contender", lambda row: row["contender"]),
        ("measured as", lambda row: row["how"]),
        ("p50 µs", _figure("p50_us", ".1f")),
        ("× torchvision", _figure("speedup", ".2f")),
        ("of copy bandwidth", _figure("of_copy_bandwidth", ".0%")),
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
        ("p50 s", _figure("p50_s", ".3f")),
        ("images/s", _figure("images_per_s", ".2f")),
        ("× torchvision", _ratio),
        ("peak MB", _figure("peak_memory_mb", ".0f")),
        ("synchronisations", _figure("synchronisations", "d")),
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
        ("cells", _figure("cells", "d")),
        ("detections", _figure("detections", "d")),
        ("unpaired", _figure("unpaired", "d")),
        ("boxes px", _figure("box_px", ".1e")),
        ("scores", _figure("score", ".1e")),
        ("masks", _figure("mask", ".1e")),
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
    """Rewrites the pages, or says what is old."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    is_old = False
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = rewritten(text)
        if given.check:
            print(f"{page.name}: {'as its files give it' if new == text else 'old; run python benchmarks/tables.py'}")
            is_old |= new != text
        else:
            page.write_text(new, encoding="utf-8")
            print(f"{page}: from {len(files_of(text))} files")
    return int(is_old)


if __name__ == "__main__":
    sys.exit(main())
