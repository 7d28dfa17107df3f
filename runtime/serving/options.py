"""How models are to be served, and what their files allow of it."""

from __future__ import annotations

from dataclasses import dataclass

from maskrcnn.errors import UserError
from maskrcnn.runtime.serving.models import Served, largest_batch

MASKS = ("rle", "bits", "none")
INSTANCE_KINDS = ("auto", "gpu", "cpu")
_LARGEST_BATCH = 8  # of files that take any; a batch of images of 800 × 1333 then needs some gigabytes

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What one may choose."""

    max_batch: int | None = None  # images in a batch; by default what the file allows
    instances: int = 1  # of the network, on each GPU
    step_instances: int = 2  # processes of each step around it
    kind: str = "auto"  # where ONNX files run, of INSTANCE_KINDS
    queue_delay_us: int = 0  # a request waits so long for others to be batched with
    pad_to: tuple[Size, ...] = ()  # heights and widths that images are padded to
    masks: str = "rle"  # how clients get masks, of MASKS
    min_score: float = 0.0  # detections below it are not sent
    threads: int = 0  # of each instance on a CPU; 0 leaves the choice to the runtime
    has_cuda_graphs: bool = True  # whether TensorRT engines run as CUDA graphs

    def __post_init__(self) -> None:
        for value, allowed, option in ((self.masks, MASKS, "--masks"), (self.kind, INSTANCE_KINDS, "--kind")):
            if value not in allowed:
                raise UserError(f"{option} {value}", f"one of {', '.join(allowed)}", "choose one of these")


def names_of(name: str) -> dict[str, str]:
    """The models of a repository that serve one network: by their part, their names."""
    return {"network": f"{name}_network", "pre": f"{name}_pre", "post": f"{name}_post", "ensemble": name}


def batch_limit(served: Served, serving: Serving) -> int:
    """The largest batch that the server makes.

    Raises:
        UserError: where an engine's profiles do not allow what is asked, or no single image.
    """
    if not served.profiles:
        return serving.max_batch or _LARGEST_BATCH
    limit = largest_batch(served.profiles)
    wanted = serving.max_batch or max(limit, 1)
    if wanted > limit:
        listed = ", ".join(dict.fromkeys(str(profile.batch) for profile in served.profiles))
        raise UserError(
            f"{served.path}: profiles for batches of {listed}, and a server for batches of 1 to {wanted}",
            "profiles that take every batch from 1 on: a server joins whatever requests are waiting",
            f"rebuild the engine with --batch 1:{wanted}:{wanted}" + (f", or use --max-batch {limit}" if limit else ""),
        )
    return wanted


def sizes(served: Served, serving: Serving) -> list[tuple[int, int, int, int]]:
    """Least and largest height, least and largest width of what the network gets; none: any multiples of the divisor.

    Raises:
        UserError: for sizes to pad to that are no multiples of the divisor or lie in no profile of the engine.
    """
    divisor = served.metadata.preprocessing.divisor
    for height, width in serving.pad_to:
        if height % divisor or width % divisor or min(height, width) < 1:
            raise UserError(f"--pad-to {height}x{width}", f"multiples of {divisor}", "for example --pad-to 800x1344")
        if served.profiles and not any(height in p.height and width in p.width for p in served.profiles):
            listed = ", ".join(dict.fromkeys(f"{profile.height}×{profile.width}" for profile in served.profiles))
            raise UserError(f"--pad-to {height}x{width}", f"a size within {listed}", f"choose one for {served.path}")
    if serving.pad_to:
        return [(height, height, width, width) for height, width in serving.pad_to]
    return sorted({(p.height.least, p.height.greatest, p.width.least, p.width.greatest) for p in served.profiles})
