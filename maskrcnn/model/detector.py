"""The detector: images in, padded detections out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskrcnn.config import LossConfig, ModelConfig
from maskrcnn.model import roi_heads, rpn
from maskrcnn.model.backbone import Backbone
from maskrcnn.model.losses import Share, Truth, own_count, roi_losses, rpn_losses
from maskrcnn.model.roi_heads import RoiHeads
from maskrcnn.model.rpn import RegionProposalNetwork
from maskrcnn.stages import LEVELS, record


class MaskRCNN(nn.Module):
    """Mask R-CNN on fixed shapes (He et al. 2017), or Faster R-CNN where the configuration has no masks.

    With masks or without, it may have a keypoint head.

    Everything after the image is a batched tensor padded to a fixed count, and nothing branches on a value, so
    the same code trains, runs, exports and compiles. A torchvision state dict of the same architecture loads
    unchanged.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.rpn = RegionProposalNetwork(config)
        self.roi_heads = RoiHeads(config)
        mean, std = config.preprocessing.mean, config.preprocessing.std
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None], persistent=False)

    def normalise(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """Pixels with zero mean and unit spread, and zero in the padding.

        Args:
            images: `[N, 3, H, W]` RGB, 0–255, padded right and bottom.
            image_sizes: int64 `[N, 2]`, (height, width) before padding.
        """
        rows = torch.arange(images.shape[2], device=images.device)[None, :] < image_sizes[:, :1]
        columns = torch.arange(images.shape[3], device=images.device)[None, :] < image_sizes[:, 1:]
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return (images.float() - self.mean) / self.std * inside

    def features(self, images: Tensor, image_sizes: Tensor) -> list[Tensor]:
        """P2 … P6, each `[N, C, H_l, W_l]`."""
        return list(self.backbone(self.normalise(images, image_sizes)).values())

    def forward(
        self, images: Tensor, image_sizes: Tensor, stages: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Detections in pixels of the resized images.

        Args:
            images: float32 or uint8 `[N, 3, H, W]` RGB, 0–255, padded right and bottom; H and W multiples of 32.
            image_sizes: int64 `[N, 2]`, (height, width) before padding.
            stages: gets the tensors on the way, under the names of `maskrcnn.stages`.

        Returns:
            `num_detections` int32 `[N]`; `boxes` float32 `[N, D, 4]` xyxy; `scores` float32 `[N, D]`,
            descending; `labels` int64 `[N, D]`, from 1; with a mask head `masks` float32 `[N, D, 28, 28]`,
            probabilities in the frame of the box; with a keypoint head `keypoints` float32 `[N, D, K, 3]`, x, y and
            the score, which is a logit. Rows from `num_detections` on are zero.
        """
        normalised = self.normalise(images, image_sizes)
        features = list(self.backbone(normalised).values())
        record(stages, normalised=normalised, **dict(zip(LEVELS, features, strict=True)))
        output = self.rpn(features, images)
        record(stages, **output.stages())
        proposals, used = self.rpn.proposals(output, image_sizes)
        record(stages, proposals=proposals)
        return self.roi_heads(features, proposals, used, image_sizes, stages)

    def losses(
        self, images: Tensor, image_sizes: Tensor, truth: Truth, loss: LossConfig, share: Share = own_count
    ) -> dict[str, Tensor]:
        """The losses of a batch, scalars whose sum is minimised.

        Args:
            images: as for `forward`.
            image_sizes: as for `forward`.
            truth: padded ground truth: `boxes` float32 `[N, G, 4]` xyxy in pixels of the resized image, `labels`
                int64 `[N, G]`, `valid` bool `[N, G]`, `masks` uint8 `[N, G, M, M]` of 0 or 255, each the part of
                the image that `mask_frames` float32 `[N, G, 4]` says, `keypoints` float32 `[N, G, K, 3]` of x, y
                in pixels of the resized image and visibility, 0 where unlabelled, and `seeds` int64 `[N]`, which
                decide which anchors and proposals are sampled. A model without masks or keypoints needs none.
            loss: matching and sampling constants.
            share: makes a count of this process a mean over all processes, see `maskrcnn.model.losses`.

        Returns:
            `objectness`, `rpn_box`, `classification`, `box` and, with such heads, `mask` and `keypoint`.
        """
        truth = {**truth, "image_sizes": image_sizes}
        features = self.features(images, image_sizes)
        anchors = self.rpn.anchors(features, images)
        # Before the head runs without gradients: autocast keeps the half-precision copies of weights that it made
        # first, and those made without gradients would have none.
        losses = rpn_losses(self.rpn, features, anchors, truth, loss, rpn.BOX_WEIGHTS, share)
        with torch.no_grad():
            output = self.rpn(features, images)
            proposals, used = self.rpn.proposals(output, image_sizes)
        return losses | roi_losses(self.roi_heads, features, proposals, used, truth, loss, roi_heads.BOX_WEIGHTS, share)
