"""Examples of users' augmentations for `augment.transform`."""

import random

import numpy as np
import torch
from torchvision.transforms import v2

_AFFINE = v2.RandomAffine(25, translate=(0.2, 0.2), scale=(0.8, 1.2))


def moved(image, target, generator):
    """Random affine transformation, mirroring, and half of the time a crop to another size."""
    image, target = v2.RandomHorizontalFlip()(*_AFFINE(image, target))
    if torch.rand((), generator=generator) < 0.5:
        image, target = v2.RandomCrop((40, 40), pad_if_needed=True)(image, target)
    return image, target


def turned(image, target, generator):
    """Random affine transformation, which keeps left and right."""
    return _AFFINE(image, target)


def same(image, target, generator):
    return image, target


def noisy(image, target, generator):
    """Darkens the image by a random number from each generator."""
    numbers = random.random(), np.random.rand(), float(torch.rand(())), float(torch.rand((), generator=generator))
    return image * (0.5 + sum(numbers) / 8), target


def boxes_left(image, target, generator):
    """Moves everything except the boxes."""
    image, changed = v2.RandomHorizontalFlip(1.0)(image, target)
    return image, {**changed, "boxes": target["boxes"]}


def boxes_lost(image, target, generator):
    return image, {**target, "boxes": target["boxes"][:-1]}


def masks_small(image, target, generator):
    return image, {**target, "masks": target["masks"][:, ::2, ::2]}


def array(image, target, generator):
    return image.numpy(), target


def bytes_(image, target, generator):
    return (255 * image).to(torch.uint8), target


def normalised(image, target, generator):
    return v2.functional.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), target


def infinite(image, target, generator):
    return image, {**target, "boxes": target["boxes"] / 0}


def relabelled(image, target, generator):
    return image, {**target, "labels": target["labels"] + 3}


def nothing(image, target, generator):
    pass


def failing(image, target, generator):
    raise KeyError("colour")


number = 5
