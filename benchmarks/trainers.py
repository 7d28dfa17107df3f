"""The trainers to compare, each with a method `run` for one optimizer step, and the batches they train on."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import torchvision_from_config
from PIL import Image
from pycocotools import mask as mask_api
from resources import memory_growth_mb
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maskrcnn.config import AugmentConfig, TrainConfig, from_dict
from maskrcnn.data.coco import CocoDataset, instance_mask
from maskrcnn.data.records import ImageRecord
from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError
from maskrcnn.files import write_json
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.training.distributed import choose_device
from maskrcnn.training.loader import Batch, collate
from maskrcnn.training.optimizer import freeze_stages, make_optimizer, parameter_groups
from maskrcnn.training.samples import TrainingSamples
from maskrcnn.training.step import AUTOCAST, Step
from maskrcnn.training.view import MIN_SIDE_PX, instances_of, resized_mask

SPLIT = "train"
_TILES = 2  # per side of a generated image; a tile has 3 shapes on average
NO_AUGMENTATION = AugmentConfig(flip_probability=0.0)


@dataclass(frozen=True, eq=False)
class Work:
    """One batch, in the form of each trainer."""

    batch: Batch  # for ours
    images: list[Tensor]  # for torchvision: float32 [3, h, w] in [0, 1]
    targets: list[dict[str, Tensor]]  # for torchvision: boxes, labels, and masks at image size


def generated_dataset(folder: Path, count: int, size_hw: tuple[int, int], classes: int) -> Path:
    """Write a COCO-format dataset of images with about a dozen shapes each.

    Args:
        folder: folder to write.
        count: number of images.
        size_hw: size of the images.
        classes: number of classes, assigned to the shapes at random.

    Returns:
        `folder`.
    """
    (folder / SPLIT).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        rng = np.random.default_rng((number, *size_hw))
        pixels, masks = _drawn(rng, size_hw)
        name = f"{number:06}.png"
        Image.fromarray(pixels).save(folder / SPLIT / name, compress_level=1)
        images.append({"id": number, "file_name": name, "height": size_hw[0], "width": size_hw[1]})
        for mask in masks:
            rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(rng.integers(1, classes + 1)),
                    "bbox": mask_api.toBbox(rle).tolist(),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": list(size_hw), "counts": rle["counts"].decode("ascii")},
                }
            )
    categories = [{"id": label, "name": f"class_{label}"} for label in range(1, classes + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(folder / "annotations" / f"instances_{SPLIT}.json", content, indent=None)
    return folder


def _drawn(rng: np.random.Generator, size_hw: tuple[int, int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """An image `[H, W, 3]` tiled from several generated ones, and the masks of its objects."""
    pixels, masks = np.zeros((*size_hw, 3), np.uint8), []
    rows, columns = (np.linspace(0, side, _TILES + 1).astype(int) for side in size_hw)
    for (top, bottom), (left, right) in itertools.product(itertools.pairwise(rows), itertools.pairwise(columns)):
        tile, objects = shapes_image(rng, (bottom - top, right - left))
        pixels[top:bottom, left:right] = tile
        for _, part in objects:
            mask = np.zeros(size_hw, bool)
            mask[top:bottom, left:right] = part
            masks.append(mask)
    return pixels, masks


def make_work(config: TrainConfig, max_batches: int, *, pinned: bool) -> list[Work]:
    """Load different batches of a dataset, without augmentation; images repeat if the dataset is smaller than a batch.

    Args:
        config: dataset, preprocessing and batch size.
        max_batches: maximum number of batches; at least one is returned.
        pinned: put our batches into page-locked memory, as our data loader does for a GPU.
    """
    dataset = CocoDataset.load(config.data, config.train_split, images=config.images or None)
    samples = TrainingSamples(dataset, config.model.preprocessing, augment=NO_AUGMENTATION, seed=config.seed)
    size, total = config.batch_size, len(dataset.images)
    batches = max(1, min(max_batches, total // size))
    chosen = [[(k * size + j) % total for j in range(size)] for k in range(batches)]
    work = [_work(samples, indices, config.model.has_masks) for indices in chosen]
    return [replace(w, batch=w.batch.pin_memory()) for w in work] if pinned else work


def _work(samples: TrainingSamples, indices: list[int], with_masks: bool) -> Work:
    loaded = [samples[0, index] for index in indices]
    for sample in loaded:
        if isinstance(sample, UserError):
            raise sample
    batch = collate(loaded, samples.preprocessing.divisor)
    images, targets = [], []
    for n, index in enumerate(indices):
        height, width = batch.image_sizes[n].tolist()
        valid = batch.valid[n]
        masks = _full_masks(samples.records[index], (height, width))
        if len(masks) != int(valid.sum()):
            raise RuntimeError(f"{len(masks)} full-size masks for {int(valid.sum())} objects of a sample")
        images.append(batch.images[n, :, :height, :width] / 255)
        targets.append({"boxes": batch.boxes[n, valid], "labels": batch.labels[n, valid]})
        if with_masks:
            targets[-1]["masks"] = torch.from_numpy(masks)
    return Work(batch, images, targets)


def _full_masks(record: ImageRecord, size_hw: tuple[int, int]) -> np.ndarray:
    """Masks uint8 `[G, h, w]` in the resized image, of the objects kept in a sample."""
    scale = np.array([size_hw[1] / record.width, size_hw[0] / record.height] * 2)
    masks = []
    for instance in instances_of(record):
        box = np.array(instance.box_xyxy_px) * scale
        mask = resized_mask(instance_mask(record, instance), size_hw)
        if mask.any() and min(box[2:] - box[:2]) >= MIN_SIDE_PX:
            masks.append(mask)
    return np.array(masks, np.uint8).reshape(-1, *size_hw)


OURS, GRAPHED, THEIRS = "maskrcnn", "maskrcnn, CUDA graphs", "torchvision"
_LOSS_TOLERANCE = 0.2  # relative, of the sum: both sample anchors and proposals at random
_THEIR_NAMES = {
    "objectness": "loss_objectness",
    "rpn_box": "loss_rpn_box_reg",
    "classification": "loss_classifier",
    "box": "loss_box_reg",
    "mask": "loss_mask",
}


def write_weights(config: TrainConfig, work: Work, device: torch.device, path: Path) -> None:
    """Write random weights with the batch-norm statistics of a batch, so that features keep their magnitude."""
    torch.manual_seed(config.seed)
    model = MaskRCNN(replace(config.model, frozen_batch_norm=False)).to(device).train()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None  # cumulative instead of moving average
    with torch.no_grad():
        model.features(work.batch.images.to(device), work.batch.image_sizes.to(device))
    save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, path)


class OurTrainer:
    """The step of `maskrcnn train`: channels last, fused optimizer, no synchronisation."""

    def __init__(self, config: TrainConfig, weights: Path, device: torch.device, precision: str) -> None:
        self.config, self.device = config, device
        self.model = MaskRCNN(config.model)
        self.model.load_state_dict(load_file(weights))
        self.model.to(device, memory_format=torch.channels_last)
        _to_training(self.model, config)
        self.optimizer = make_optimizer(self.model, config)
        self.step = Step(self.model, self.optimizer, config, device, precision)
        self.metrics: dict[str, Tensor] = {}

    def run(self, work: Work) -> None:
        """Take one optimizer step, from a batch in host memory as the data loader returns it."""
        self.metrics = self.step.run([work.batch])

    def check(self) -> None:
        """Raise FloatingPointError if the last step was skipped because its loss was not finite."""
        if not bool(self.metrics["finite"]):
            raise FloatingPointError(f"loss {float(self.metrics['loss'])}; the step was skipped")

    def losses(self, work: Work) -> dict[str, float]:
        """Return the losses of a batch in FP32 with the present weights."""
        batch = work.batch.to(self.device)
        images = batch.images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), _FixedBatchNorm(self.model):
            found = self.model.losses(images, batch.image_sizes, batch.truth(), self.config.loss)
        return {name: float(value) for name, value in found.items()}


class GraphedTrainer(OurTrainer):
    """The step of `maskrcnn train --cuda-graphs`."""

    def __init__(self, config: TrainConfig, weights: Path, device: torch.device, precision: str) -> None:
        super().__init__(replace(config, cuda_graphs=True), weights, device, precision)
        self._seen: set[int] = set()

    def run(self, work: Work) -> None:
        """Take one optimizer step; the first with a batch is preceded by those after which its shape has a graph."""
        for _ in range(1 if id(work) in self._seen else 3):
            super().run(work)
        self._seen.add(id(work))


class TorchvisionTrainer:
    """The step of torchvision's references/detection/engine.py, `train_one_epoch`.

    Contiguous memory, masks at image size, `torch.optim.SGD` with its defaults. Learning rate, momentum, weight decay
    and frozen stages are those of our trainer; gradients are not clipped. In bfloat16, which the reference does not
    have, its autocast region is in bfloat16 and there is no scaler.
    """

    def __init__(self, config: TrainConfig, weights: Path, device: torch.device, precision: str) -> None:
        self.config, self.device, self.kind = config, device, AUTOCAST[precision]
        self.model = torchvision_from_config(config.model, config.loss)
        self.model.load_state_dict(load_file(weights))
        self.model.to(device)
        _to_training(self.model, config)
        groups = parameter_groups(self.model, config.weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
        self.scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None

    def run(self, work: Work) -> None:
        """Take one optimizer step; as in the reference, the loss is read and must be finite."""
        loss = sum(self._losses(work).values())
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss {loss.item()}")
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def check(self) -> None:
        """Do nothing: `run` raises."""

    def losses(self, work: Work) -> dict[str, float]:
        """Return the losses of a batch in FP32 with the present weights, under our names."""
        kind, self.kind = self.kind, None
        with torch.no_grad(), _FixedBatchNorm(self.model):
            found = self._losses(work)
        self.kind = kind
        return {ours: float(found[theirs]) for ours, theirs in _THEIR_NAMES.items() if theirs in found}

    def _losses(self, work: Work) -> dict[str, Tensor]:
        images = [image.to(self.device) for image in work.images]
        targets = [{name: value.to(self.device) for name, value in target.items()} for target in work.targets]
        with torch.autocast(self.device.type, dtype=self.kind, enabled=self.kind is not None):
            return self.model(images, targets)


Trainer = OurTrainer | TorchvisionTrainer
TRAINERS: dict[str, type] = {OURS: OurTrainer, GRAPHED: GraphedTrainer, THEIRS: TorchvisionTrainer}


def trainers_on(device: torch.device, precision: str) -> dict[str, type]:
    """The trainers that can take a step there."""
    has_graphs = device.type == "cuda" and precision != "fp16"
    return {name: kind for name, kind in TRAINERS.items() if has_graphs or name != GRAPHED}


def compared_losses(ours: OurTrainer, theirs: TorchvisionTrainer, work: Work) -> dict[str, dict[str, float]]:
    """Return both trainers' losses of a batch with fixed batch-norm statistics, and their sums.

    Raises:
        ValueError: if the sums differ by more than `_LOSS_TOLERANCE`, or one trainer lacks a loss.
    """
    found = {OURS: ours.losses(work), THEIRS: theirs.losses(work)}
    for losses in found.values():
        losses["sum"] = sum(losses.values())
    first, second = found[OURS], found[THEIRS]
    text = ", ".join(f"{name} {value:.4g} and {second.get(name, math.nan):.4g}" for name, value in first.items())
    if first.keys() != second.keys() or not abs(first["sum"] - second["sum"]) <= _LOSS_TOLERANCE * abs(second["sum"]):
        raise ValueError(f"losses that differ by more than {_LOSS_TOLERANCE:.0%}: {text}")
    return found


def _to_training(model: nn.Module, config: TrainConfig) -> None:
    """Set training mode, with the backbone's first stages frozen as in `maskrcnn train`."""
    frozen = freeze_stages(model, config.trainable_stages)
    model.train()
    for module in frozen:
        module.eval()


class _FixedBatchNorm:
    """Batch norm uses its stored statistics, unchanged, within the context."""

    def __init__(self, model: nn.Module) -> None:
        self.norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.training]

    def __enter__(self) -> None:
        for norm in self.norms:
            norm.eval()

    def __exit__(self, *_: object) -> None:
        for norm in self.norms:
            norm.train()


def peak_memory_mb(config: dict[str, Any], weights: str, trainer: str, precision: str, steps: int) -> float | None:
    """Measure the memory of a trainer in this process, which should hold nothing else.

    Args:
        config: a `TrainConfig` as a dictionary.
        weights: file written by `write_weights`.
        trainer: key of `TRAINERS`.
        precision: "fp32", "bf16" or "fp16".
        steps: optimizer steps to take.

    Returns:
        MB: on a GPU the peak allocated by PyTorch; on a CPU the growth since before the model was made, None where the
        system does not report it.
    """
    settings = from_dict(TrainConfig, config)
    device = choose_device(settings.device)
    on_gpu = device.type == "cuda"
    work = make_work(settings, steps, pinned=on_gpu)

    def train() -> None:
        chosen = TRAINERS[trainer](settings, Path(weights), device, precision)
        for number in range(steps):
            chosen.run(work[number % len(work)])

    if not on_gpu:
        return memory_growth_mb(train)
    torch.cuda.reset_peak_memory_stats(device)
    train()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e6
