"""The detector: images in, padded detections out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskrcnn.config import LossConfig, ModelConfig
from maskrcnn.model.backbone import Backbone
from maskrcnn.model.losses import CountMean, Truth, identity, roi_losses, rpn_losses
from maskrcnn.model.roi_heads import RoiHeads
from maskrcnn.model.rpn import RegionProposalNetwork
from maskrcnn.stages import LEVELS, record


class MaskRCNN(nn.Module):
    """Mask R-CNN with fixed shapes (He et al. 2017); Faster R-CNN without masks; both optionally with keypoints.

    All intermediate values are batched tensors padded to a fixed count, and no control flow depends on values, so that
    the same code trains, runs, exports and compiles. Loads torchvision state dicts of the same architecture unchanged.
    """

    mean: Tensor
    std: Tensor

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
        """Normalise pixels to zero mean and unit variance; padding becomes zero.

        Args:
            images: `[N, C, H, W]`, RGB unless the model has other channels, 0–255, padded right and bottom.
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
        """Detect objects; coordinates are pixels of the resized images.

        Args:
            images: float32 or uint8 `[N, C, H, W]`, C of `ModelConfig.channels` (3: RGB), 0–255, padded right and
                bottom; H and W multiples of 32.
            image_sizes: int64 `[N, 2]`, (height, width) before padding.
            stages: dict that receives the intermediate tensors under the names of `maskrcnn.stages`.

        Returns:
            `num_detections` int32 `[N]`; `boxes` float32 `[N, D, 4]` xyxy; `scores` float32 `[N, D]`, descending;
            `labels` int64 `[N, D]`, from 1; with a mask head `masks` float32 `[N, D, 28, 28]`, probabilities relative
            to the box; with a keypoint head `keypoints` float32 `[N, D, K, 3]` (x, y, logit). Rows from
            `num_detections` on are zero.
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
        self, images: Tensor, image_sizes: Tensor, truth: Truth, loss: LossConfig, mean_count: CountMean = identity
    ) -> dict[str, Tensor]:
        """Compute the training losses of a batch; the training objective is their sum.

        Args:
            images: as in `forward`.
            image_sizes: as in `forward`.
            truth: padded ground truth: `boxes` float32 `[N, G, 4]` xyxy in pixels of the resized image; `labels` int64
                `[N, G]`; `valid` bool `[N, G]`; `masks` uint8 `[N, G, M, M]` of 0 or 255 (all 0: no mask), crops of the
                region `mask_frames` float32 `[N, G, 4]`; `keypoints` float32 `[N, G, K, 3]` (x, y in pixels of the
                resized image, visibility, 0 if unlabelled); `seeds` int64 `[N]`, which determine the sampled anchors
                and proposals. Masks and keypoints are needed only by models that have such heads.
            loss: matching and sampling constants.
            mean_count: mean of a count over all processes, see `maskrcnn.model.losses`.

        Returns:
            scalars `objectness`, `rpn_box`, `classification`, `box` and, with such heads, `mask` and `keypoint`.
        """
        truth = {**truth, "image_sizes": image_sizes}
        features = self.features(images, image_sizes)
        anchors = self.rpn.anchors(features, images)
        # Before the head runs under no_grad: autocast caches the first half-precision copy of each weight, and a copy
        # made under no_grad has no gradient.
        losses = rpn_losses(self.rpn, features, anchors, truth, loss, mean_count)
        with torch.no_grad():
            output = self.rpn(features, images)
            proposals, used = self.rpn.proposals(output, image_sizes)
        return losses | roi_losses(self.roi_heads, features, proposals, used, truth, loss, mean_count)
