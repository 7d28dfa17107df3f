"""The custom ops in PyTorch beside torchvision's, in one run.

    python benchmarks/ops.py

Sizes are those of Mask R-CNN ResNet-50 FPN on one image of 800×1088: 1000 RoIs pooled 7×7 and 100 pooled 14×14
from four levels of 256 channels, and NMS over five levels of 1000 boxes and over 1000 boxes of 80 classes. Values
are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from timing import environment, time_in_turns
from torch import Tensor

from maskrcnn.model.ops import batched_nms, multilevel_roi_align

SIZE_HW = (800, 1088)
Case = tuple[Callable[[], Any], Callable[[], Any]]  # ours, torchvision's


def random_boxes(count: int, device: str, seed: int = 0) -> Tensor:
    """Boxes `[count, 4]` of all sizes, 8 to 600 px, inside the image."""
    rng = torch.Generator().manual_seed(seed)
    limit = torch.tensor([SIZE_HW[1], SIZE_HW[0]])
    sides = 8 * torch.exp(torch.rand(count, 2, generator=rng) * 4.3)
    corners = torch.rand(count, 2, generator=rng) * (limit - sides).clamp(min=0)
    return torch.cat([corners, torch.minimum(corners + sides, limit)], dim=1).to(device)


def roi_align_case(count: int, bins: int, device: str) -> Case:
    """RoIAlign of `count` RoIs, `bins` × `bins`."""
    rng = torch.Generator().manual_seed(1)
    strides = (4, 8, 16, 32)
    features = [torch.randn(1, 256, SIZE_HW[0] // s, SIZE_HW[1] // s, generator=rng).to(device) for s in strides]
    rois = random_boxes(count, device)
    pool = torchvision.ops.MultiScaleRoIAlign([str(i) for i in range(4)], bins, 2)
    named = {str(i): feature for i, feature in enumerate(features)}

    def ours() -> Tensor:
        return multilevel_roi_align(features, rois[None], output_size=bins, sampling_ratio=2, aligned=False)[0]

    def theirs() -> Tensor:
        return pool(named, [rois], [SIZE_HW])

    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-3)
    return ours, theirs


def nms_case(groups: int, per_group: int, device: str, iou: float) -> Case:
    """NMS of `groups` groups of about `per_group` boxes each."""
    count = groups * per_group
    boxes = random_boxes(count, device, seed=2)
    owner = torch.randint(0, groups, (count,), generator=torch.Generator().manual_seed(3)).to(device)
    scores = torch.linspace(1, 0, count, device=device)
    counts = torch.tensor([count], device=device)

    def ours() -> list[int]:
        kept, number = batched_nms(
            boxes[None], owner[None].to(torch.int32), counts, iou_threshold=iou, max_output=count
        )
        return kept[0, : number[0]].tolist()

    def theirs() -> list[int]:
        return torchvision.ops.batched_nms(boxes, scores, owner, iou).tolist()

    first, second = set(ours()), set(theirs())
    # Torchvision shifts coordinates by group, which rounds them: a pair at the very threshold may fall otherwise.
    assert len(first ^ second) <= count // 200, f"{len(first ^ second)} of {count} boxes are kept by one side only"
    return ours, theirs


def main() -> None:
    """Prints a table of medians and ratios, and the machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=20)
    given = parser.parse_args()
    cases = {
        "RoIAlign 1000 RoIs 7×7": roi_align_case(1000, 7, given.device),
        "RoIAlign 100 RoIs 14×14": roi_align_case(100, 14, given.device),
        "NMS 5 groups of 1000": nms_case(5, 1000, given.device, 0.7),
        "NMS 80 groups of 12": nms_case(80, 12, given.device, 0.5),
    }
    print(f"{'':26}{'ours ms':>10}{'torchvision ms':>16}{'ratio':>8}")
    with torch.inference_mode():
        for name, sides in cases.items():
            calls = {side: _timed(call, given.device) for side, call in zip(("ours", "theirs"), sides, strict=True)}
            samples = time_in_turns(calls, repeat=given.repeat, warmup=3)
            ours, theirs = (samples[side].percentile_ms(50) for side in ("ours", "theirs"))
            print(f"{name:26}{ours:10.2f}{theirs:16.2f}{theirs / ours:8.2f}")
    print(json.dumps(environment()))


def _timed(call: Callable[[], Any], device: str) -> Callable[[int], Any]:
    def run(turn: int) -> Any:
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return run


if __name__ == "__main__":
    main()
