"""`maskrcnn evaluate`: its options, and what it prints and writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from maskrcnn.errors import UserError
from maskrcnn.files import check_target, report_path, write_json

if TYPE_CHECKING:
    from maskrcnn.runtime.evaluation.differences import Difference
    from maskrcnn.runtime.evaluation.evaluate import Evaluation
    from maskrcnn.runtime.evaluation.ground_truth import GroundTruth


class Kind(str, Enum):
    """What is scored, by pycocotools' names."""

    BBOX = "bbox"
    SEGM = "segm"
    KEYPOINTS = "keypoints"


class _ScorerName(str, Enum):
    """Who computes the figures; they are the same."""

    PYCOCOTOOLS = "pycocotools"
    FAST = "fast"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of one call."""

    model: Path | None
    data: Path | None
    split: str
    backend: str | None
    batch_size: int
    processes: int
    resume: Path | None
    results: Path | None
    annotations: Path | None
    images: Path | None
    kinds: tuple[str, ...]
    scorer: str
    compare: Path | None
    resamples: int
    seed: int
    threshold: float
    per_class: bool
    save_results: Path | None
    json: Path | None
    report: Path | None
    worst: int


def evaluate(
    model: Annotated[Path | None, typer.Argument(help="Checkpoint, ONNX file or engine.")] = None,
    data: Annotated[Path | None, typer.Option(help="COCO-format folder.")] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "val",
    backend: Annotated[str | None, typer.Option(help="torch, onnxruntime, openvino or tensorrt.")] = None,
    provider: Annotated[str | None, typer.Option(help="Of onnxruntime: cpu, cuda or tensorrt.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of torch: fp32, bf16 or fp16.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    processes: Annotated[int, typer.Option(min=1, help="That share the images; or start with torchrun.")] = 1,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep detections there image by image, and go on from them.")
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Instead of a model: results in COCO's format.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="Of --results: annotations in COCO's format.")] = None,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Of --annotations: images for --report.")] = None,
    iou_type: Annotated[list[Kind] | None, typer.Option(help="Repeatable; default what the results have.")] = None,
    scorer: Annotated[_ScorerName, typer.Option(help="fast: the same figures sooner.")] = _ScorerName.PYCOCOTOOLS,
    compare: Annotated[Path | None, typer.Option(help="Another results file or model: the AP's difference.")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of the images, for intervals of AP.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Lowest score in image differences, confusions and pictures.")
    ] = 0.5,
    per_class: Annotated[bool, typer.Option("--per-class", help="Print the AP of each class.")] = False,
    save_results: Annotated[Path | None, typer.Option(help="Write results as COCO's server takes them.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write metrics there, and a model's results.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page there: a file, or a folder.")] = None,
    worst: Annotated[int, typer.Option(min=0, help="Most pictures in it.")] = 12,
) -> None:
    """COCO's metrics of boxes, masks and keypoints: of a model on a dataset, or of any results file."""
    from maskrcnn.cli.console import console
    from maskrcnn.runtime.detector import backend_spec

    _run_evaluate(
        console,
        Request(
            model=model,
            data=data,
            split=split,
            backend=backend_spec(backend, provider, precision),
            batch_size=batch_size,
            processes=processes,
            resume=resume,
            results=results,
            annotations=annotations,
            images=images,
            kinds=tuple(kind.value for kind in iou_type or ()),
            scorer=scorer.value,
            compare=compare,
            resamples=resamples,
            seed=seed,
            threshold=threshold,
            per_class=per_class,
            save_results=save_results,
            json=json,
            report=report,
            worst=worst,
        ),
    )


def _run_evaluate(console: Console, request: Request) -> None:
    """Evaluates, prints and writes what was asked for.

    Args:
        console: where to print.
        request: the options.

    Raises:
        UserError: for options that contradict each other and files that cannot be used.
    """
    from maskrcnn.api.evaluate import evaluate_model

    _check(request)
    evaluation = evaluate_model(console, request, request.model) if request.model else _of_file(console, request)
    if evaluation is None:
        return  # the first process has the results
    truth = next(iter(evaluation.scored.values())).truth
    _print_remarks(console, evaluation)
    console.print(evaluation.table(), markup=False)
    if request.per_class:
        for kind, scored in evaluation.scored.items():
            console.print(_class_table(kind, scored.by_class()), markup=False)
    console.print(evaluation.seconds.line())
    if request.model:
        rate = evaluation.images / max(evaluation.seconds.detect, 1e-9)
        console.print(f"{rate:.2f} images/s and process, from file to pasted masks")
    if request.save_results is not None:  # before the comparison: they may have taken hours
        for path, count in _save(request.save_results, evaluation):
            console.print(f"{count} results → {path}")
    differences = _differences(console, request, evaluation, truth) if request.compare else {}
    if request.json is not None:
        _write_json(request, evaluation, differences)
    if request.report is not None:
        console.print(f"report → {_write_report(request, evaluation, differences, truth)}")


def _print_remarks(console: Console, evaluation: Evaluation) -> None:
    for remark in dict.fromkeys(scored.results.remark() for scored in evaluation.scored.values()):
        if remark:
            console.print(remark, markup=False)


def _check(request: Request) -> None:
    """Refuses options that contradict each other."""
    if (request.model is None) == (request.results is None):
        came = "a model and --results" if request.model else "neither a model nor --results"
        raise UserError(came, "one of them", "maskrcnn evaluate MODEL --data DIR, or --results FILE --annotations FILE")
    if request.model is not None and request.data is None:
        raise UserError("a model without --data", "the folder of a dataset", "add --data DIR")
    if request.model is not None and request.annotations is not None:
        raise UserError("a model with --annotations", "--data DIR", "name the folder that holds annotations/")
    if request.results is not None and (request.annotations is None) == (request.data is None):
        came = "--results with --annotations and --data" if request.data else "--results without --annotations"
        raise UserError(came, "what the results are of", "add --annotations FILE, or --data DIR")
    if request.results is not None and (request.resume is not None or request.processes > 1):
        raise UserError("--results with --resume or --processes", "a model", "leave them out: nothing is detected")
    if request.images is not None and request.annotations is None:
        raise UserError("--images without --annotations", "--annotations", "leave it out: --data has the images")
    if request.compare is not None and not request.compare.is_file():
        raise UserError(f"--compare {request.compare}: no such file", "a results file or a model", "check the path")
    _check_outputs(request)


def _check_outputs(request: Request) -> None:
    """That what is written can be, and takes the place of nothing that is read."""
    outputs = {"--save-results": request.save_results, "--json": request.json, "--resume": request.resume}
    if request.report is not None:
        outputs["--report"] = report_path(request.report)
    read = [path.resolve() for path in (request.model, request.results, request.annotations, request.compare) if path]
    for option, path in outputs.items():
        if path is None:
            continue
        if path.resolve() in read:
            raise UserError(f"{option} {path}, a file that is read", "another file", "choose another name")
        check_target(path)


def _of_file(console: Console, request: Request) -> Evaluation:
    """The evaluation of --results."""
    from maskrcnn.api.evaluate import dataset_of
    from maskrcnn.runtime.evaluation.evaluate import score_file
    from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
    from maskrcnn.runtime.evaluation.scoring import Scorer

    if request.annotations is not None:
        truth = GroundTruth.read(request.annotations)
    else:
        truth = GroundTruth.of_dataset(dataset_of(console, request, require_images=False))
    found = score_file(truth, request.results, request.kinds, scorer=Scorer(request.scorer))
    console.print(
        f"{request.results}: {len(found.results)} results on {found.images} images of {truth.source}", markup=False
    )
    return found


def _differences(
    console: Console, request: Request, evaluation: Evaluation, truth: GroundTruth
) -> dict[str, Difference]:
    """Each kind beside the same of --compare."""
    from maskrcnn.api.evaluate import evaluate_model, progress_bar
    from maskrcnn.runtime.detector import BACKENDS
    from maskrcnn.runtime.evaluation.differences import difference
    from maskrcnn.runtime.evaluation.evaluate import score_file
    from maskrcnn.runtime.evaluation.protocol import KIND_NAMES
    from maskrcnn.runtime.evaluation.scoring import Scorer
    from maskrcnn.runtime.evaluation.sharding import Share

    kinds = tuple(evaluation.scored)
    if request.compare.suffix not in BACKENDS:
        other = score_file(truth, request.compare, kinds, scorer=Scorer(request.scorer))
        _print_remarks(console, other)
    elif request.data is None or Share.of_environment().count > 1:
        came = f"--compare {request.compare}, a model, " + ("under torchrun" if request.data else "with --annotations")
        do = "add --data DIR, without torchrun; or --save-results of that model, and compare with the file"
        raise UserError(came, "a results file, or a dataset to run the model on", do)
    else:
        other = evaluate_model(console, replace(request, kinds=kinds, resume=None), request.compare)
    found = {}
    for kind, scored in evaluation.scored.items():
        with progress_bar(console, "resampling", request.resamples) as advance:
            found[kind] = difference(
                scored,
                other.scored[kind],
                min_score=request.threshold,
                resamples=request.resamples,
                seed=request.seed,
                progress=advance,
            )
        console.print(f"{KIND_NAMES[kind]} of {request.compare} minus the above:", markup=False)
        console.print("\n".join(found[kind].lines()), markup=False)
    return found


def _class_table(kind: str, by_class: dict[str, dict[str, float]]) -> str:
    names = [name for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large") if name in _first(by_class)]
    width = max([len(name) for name in by_class] + [len(kind)])
    lines = [f"{kind:{width}}{'objects':>9}" + "".join(f"{name:>11}" for name in names)]
    for name, figures in by_class.items():
        cells = (f"{figures[key]:11.4f}" if figures[key] >= 0 else f"{'':11}" for key in names)
        lines.append(f"{name:{width}}{figures['objects']:9}" + "".join(cells))
    return "\n".join(lines)


def _first(by_class: dict[str, dict[str, float]]) -> dict[str, float]:
    return next(iter(by_class.values()), {})


def _save(path: Path, evaluation: Evaluation) -> Iterator[tuple[Path, int]]:
    """Writes a file for each kind, and gives their names and numbers of results."""
    from maskrcnn.runtime.evaluation.results_file import write_server_results

    for kind in evaluation.scored:
        own = path if len(evaluation.scored) == 1 else path.with_suffix(f".{kind}{path.suffix}")
        write_server_results(own, evaluation.results, kind)
        yield own, len(evaluation.results)


def _write_json(request: Request, evaluation: Evaluation, differences: dict[str, Difference]) -> None:
    from maskrcnn.runtime.evaluation.protocol import KIND_NAMES

    content: dict[str, Any] = {"model": str(request.model)} if request.model else {"file": str(request.results)}
    content |= {"box": evaluation.box, "mask": evaluation.mask, "keypoint": evaluation.keypoint}
    content |= {KIND_NAMES[kind]: scored.metrics for kind, scored in evaluation.scored.items()}
    content["per_class"] = {KIND_NAMES[kind]: scored.by_class() for kind, scored in evaluation.scored.items()}
    content["seconds"] = asdict(evaluation.seconds)
    if differences:
        content["compared_with"] = str(request.compare)
        content["difference"] = {KIND_NAMES[kind]: asdict(found) for kind, found in differences.items()}
    if request.model:
        content["results"] = evaluation.results
    write_json(request.json, content)


def _write_report(
    request: Request, evaluation: Evaluation, differences: dict[str, Difference], truth: GroundTruth
) -> Path:
    from maskrcnn.files import atomic_path
    from maskrcnn.runtime.evaluation.report import report_page

    path = report_path(request.report)
    remarks = {scored.results.remark() for scored in evaluation.scored.values()} - {""}
    facts = [
        f"{evaluation.images} images of {truth.source}",
        f"{len(evaluation.results)} results",
        f"scored by {request.scorer}",
        evaluation.seconds.line(),
        *sorted(remarks),
        *([f"compared with {request.compare}"] if request.compare else []),
    ]
    html = report_page(
        str(request.model or request.results),
        facts,
        evaluation.scored,
        differences=differences,
        image_file=_image_file(request, truth),
        min_score=request.threshold,
        worst=request.worst,
        resamples=request.resamples,
        seed=request.seed,
    )
    with atomic_path(path) as draft:
        draft.write_text(html, encoding="utf-8")
    return path


def _image_file(request: Request, truth: GroundTruth) -> Callable[[int], Path] | None:
    """Where the image of an id lies; None where nobody said."""
    from maskrcnn.data.coco import find_split, image_folder

    folder = image_folder(request.data, find_split(request.data, request.split)) if request.data else request.images
    if folder is None or request.worst == 0:
        return None
    return lambda image_id: folder / str(truth.images[image_id].get("file_name", image_id))
