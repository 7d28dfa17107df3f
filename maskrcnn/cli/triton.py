"""`maskrcnn triton`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from maskrcnn.api.serving import InstanceKind, MaskFormat, NetworkStep
from maskrcnn.cli.console import ConsoleProgress, show
from maskrcnn.errors import UserError

_DETECTIONS, _BATCHING, _SERVER, _REPOSITORY = "Detections", "Batching", "Server", "Repository"


def _option(panel: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **options)


def triton(
    models: Annotated[list[Path], typer.Argument(help="ONNX files, TensorRT engines, OpenVINO engines (.xml).")],
    out: Annotated[Path, typer.Argument(help="Model repository: a new folder, or one to add versions to.")],
    name: Annotated[
        str | None, _option(_REPOSITORY, help="Model name that clients use (default: from the file name).")
    ] = None,
    raw: Annotated[
        bool, _option(_REPOSITORY, "--raw", help="Write only the network: tensors in, tensors out.")
    ] = False,
    network: Annotated[
        NetworkStep,
        _option(
            _SERVER,
            help="Backend of the network; native: Triton's backend for the file, python: Triton's Python backend, with "
            "the runtime installed in the server's Python (for servers without the native backend, too).",
        ),
    ] = NetworkStep.NATIVE,
    keep_config: Annotated[
        bool,
        _option(_REPOSITORY, "--keep-config", help="Add versions under existing configurations, even if these differ."),
    ] = False,
    plugin_library: Annotated[
        Path | None,
        _option(
            _REPOSITORY,
            help="Plugin library libmaskrcnn_plugins.so, for engines that use it (default: from the cache).",
        ),
    ] = None,
    masks: Annotated[
        MaskFormat,
        _option(_DETECTIONS, help="Mask format; rle: COCO's run lengths, bits: eight pixels per byte."),
    ] = MaskFormat.RLE,
    min_score: Annotated[float, _option(_DETECTIONS, min=0, max=1, help="Minimum score of a detection to send.")] = 0.0,
    max_batch: Annotated[
        int | None, _option(_BATCHING, min=1, help="Maximum batch size (default: 8, or the engine's maximum).")
    ] = None,
    queue_delay: Annotated[
        int,
        _option(
            _BATCHING, min=0, metavar="MICROSECONDS", help="Time that a request waits to be batched with others, µs."
        ),
    ] = 0,
    pad_to: Annotated[
        list[str] | None,
        _option(
            _BATCHING,
            metavar="HEIGHTxWIDTH",
            help="Size in px to pad images to, repeatable; only images of equal size are batched.",
        ),
    ] = None,
    instances: Annotated[
        int,
        _option(
            _SERVER,
            min=1,
            help="Number of instances of the network on each GPU, or on the CPU. There, one instance per core with "
            "--threads 1 gives the highest throughput.",
        ),
    ] = 1,
    step_instances: Annotated[
        int, _option(_SERVER, min=1, help="Number of processes for each step before and after the network.")
    ] = 2,
    kind: Annotated[
        InstanceKind, _option(_SERVER, help="Device for ONNX files; auto: a GPU if present.")
    ] = InstanceKind.AUTO,
    threads: Annotated[
        int, _option(_SERVER, min=0, help="Number of threads per CPU instance; 0: the runtime's default.")
    ] = 0,
    cuda_graphs: Annotated[bool, _option(_SERVER, help="Run TensorRT engines as CUDA graphs.")] = True,
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server: image files in, detections out."""
    from maskrcnn.api.serving import triton as run

    result = run(
        models,
        out,
        name=name,
        raw=raw,
        network=network,
        masks=masks,
        min_score=min_score,
        max_batch=max_batch,
        queue_delay=queue_delay,
        pad_to=[_size(text) for text in pad_to or ()],
        instances=instances,
        step_instances=step_instances,
        kind=kind,
        threads=threads,
        cuda_graphs=cuda_graphs,
        plugin_library=plugin_library,
        keep_config=keep_config,
        progress=ConsoleProgress(),
    )
    show("\n".join(result.lines()))


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if match is None:
        raise UserError(f"--pad-to {text}", "HEIGHTxWIDTH in pixels", "for example --pad-to 800x1344")
    return int(match[1]), int(match[2])
