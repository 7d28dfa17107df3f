"""`maskrcnn triton`: its options, and what it prints."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from maskrcnn.errors import UserError

if TYPE_CHECKING:
    from maskrcnn.runtime.serving.models import Served, Serving, Size
    from maskrcnn.runtime.serving.triton import Written


def triton(
    models: Annotated[list[Path], typer.Argument(help="ONNX files, TensorRT engines, OpenVINO engines (.xml).")],
    out: Annotated[Path, typer.Argument(help="Model repository: a new folder, or one to add versions to.")],
    name: Annotated[str | None, typer.Option(help="For clients, with one model; default after the file.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The bare network: tensors in, tensors out.")] = False,
    masks: Annotated[str, typer.Option(help="For clients: rle (COCO's), bits or none.")] = "rle",
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Lowest score sent.")] = 0.0,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Most images at once; default 8, or what an engine allows.")
    ] = None,
    queue_delay: Annotated[
        int, typer.Option(min=0, metavar="MICROSECONDS", help="Wait so long for others to batch a request with.")
    ] = 0,
    pad_to: Annotated[
        list[str] | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Pad images to this size, repeatable: only equal sizes are batched."),
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="Of the network, on each GPU.")] = 1,
    step_instances: Annotated[int, typer.Option(min=1, help="Processes that decode, and that make masks.")] = 2,
    kind: Annotated[
        str, typer.Option(help="Where ONNX files run: gpu, cpu, or auto for a GPU if there is one.")
    ] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Of each instance on a CPU; 0: the runtime's choice.")] = 0,
    cuda_graphs: Annotated[bool, typer.Option(help="Run TensorRT engines as CUDA graphs.")] = True,
    plugin_library: Annotated[
        Path | None, typer.Option(help="For engines that call it: libmaskrcnn_plugins.so; default from the cache.")
    ] = None,
    keep_config: Annotated[
        bool, typer.Option("--keep-config", help="Add versions under configurations that are there, as they are.")
    ] = False,
) -> None:
    """Writes a model repository for NVIDIA's Triton Inference Server: images in, detections out."""
    from maskrcnn.cli.console import console
    from maskrcnn.runtime.serving.models import Serving

    serving = Serving(
        max_batch=max_batch,
        instances=instances,
        step_instances=step_instances,
        kind=kind,
        queue_delay_us=queue_delay,
        pad_to=_sizes(pad_to or ()),
        masks=masks,
        min_score=min_score,
        threads=threads,
        has_cuda_graphs=cuda_graphs,
    )
    options = {"name": name, "is_bare": raw, "keeps_config": keep_config, "plugin_library": plugin_library}
    _run_triton(console, models, out, serving, **options)


def _run_triton(
    console: Console,
    models: Sequence[Path],
    out: Path,
    serving: Serving,
    *,
    name: str | None = None,
    is_bare: bool = False,
    keeps_config: bool = False,
    plugin_library: Path | None = None,
) -> None:
    """Writes models to a repository and prints what a server needs to load it.

    Args:
        console: to print to.
        models: ONNX files and engines.
        out: the repository.
        serving: how they are served.
        name: for clients, with one model only; by default after the file.
        is_bare: without the steps from image files and to detections.
        keeps_config: add versions under configurations that are there.
        plugin_library: for engines that call it; by default from the cache.

    Raises:
        UserError: for models that cannot be served, and where something would be lost.
    """
    from maskrcnn.runtime.serving.models import read_served
    from maskrcnn.runtime.serving.triton import default_name, write_models

    if name is not None and len(models) > 1:
        raise UserError(f"--name {name} for {len(models)} models", "one model", "leave it out, or name one model")
    served = [(name or default_name(path), read_served(path, plugin_library=plugin_library)) for path in models]
    with console.status(f"writing {out}"):
        written = write_models(out, served, serving, is_bare=is_bare, keeps_config=keeps_config)
    flags: list[str] = []
    for each, (_, model) in zip(written, served, strict=True):
        console.print(_described(each, model), markup=False)
        flags += [flag.format(folder=f"/models/{each.models[0]}/{each.version}") for flag in model.flags]
    command = ["tritonserver", "--model-repository=/models", *dict.fromkeys(flags)]
    console.print(f"start, with {out} at /models: {shlex.join(command)}", markup=False)


def _sizes(values: Sequence[str]) -> tuple[Size, ...]:
    """What `--pad-to HEIGHTxWIDTH` says, as often as it is given."""
    found = []
    for text in values:
        match = re.fullmatch(r"(\d+)[x×](\d+)", text)
        if match is None:
            raise UserError(f"--pad-to {text}", "HEIGHTxWIDTH in pixels", "for example --pad-to 800x1344")
        found.append((int(match[1]), int(match[2])))
    return tuple(found)


def _described(written: Written, served: Served) -> str:
    state = "written" if written.is_new else "there already"
    lines = [
        f"{written.name}: {served.path} in {served.metadata.precision} on Triton's {served.backend} backend, "
        f"version {written.version} {state}",
        f"  models: {', '.join(written.models)}",
    ]
    return "\n".join([*lines, *(f"  needs: {need}" for need in served.needs)])
