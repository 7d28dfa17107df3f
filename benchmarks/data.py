"""Cost of the training data pipeline.

    python benchmarks/data.py DATASET [--split train] [--min-size 800] [--images 200] [--workers 2]

prints, for one core, the time of each stage of a plain sample and of whole samples with each augmentation alone, and
the rate of the loader with its workers. DATASET is a COCO-format folder.

    python benchmarks/data.py [--images 118287] [--workers 8] [--samples 2000] [--start-method fork]

generates an annotation file like COCO's train2017 and prints the time and memory of loading it with pycocotools and
with this package (first and cached), and the memory of the training process and its loader processes.

    python benchmarks/data.py --objects 30,300,3000

prints the memory of a training step on one image of 800×1344 with these numbers of objects.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from resources import call_in_new_process, memory_growth_mb
from session import numbers
from timing import environment

from maskrcnn.config import AugmentConfig, LossConfig, ModelConfig
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.images import read_image
from maskrcnn.data.layouts import find_split
from maskrcnn.errors import UserError, report_errors
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.training.augmentation import Augmentation
from maskrcnn.training.loader import collate, training_loader
from maskrcnn.training.samples import Sample, TrainingSamples
from maskrcnn.training.view import MASK_SIDE, objects_in_view

_BATCH_SIZE = 8
AUGMENTATIONS = {
    "flip": {},
    "colours": {"colour_probability": 1.0},
    "large-scale jitter": {"jitter_probability": 1.0},
    "perspective": {"perspective_probability": 1.0},
    "mosaic": {"mosaic_probability": 1.0},
    "mixup": {"mixup_probability": 1.0},
    "copy-paste": {"copy_paste_probability": 1.0},
}


def _stage_seconds(dataset: CocoDataset, preprocessing: Preprocessing, images: int) -> dict[str, float]:
    """Seconds per image in each stage of a flipped and resized sample; flipping copies nothing."""
    config = AugmentConfig()
    augmentation, rng = Augmentation(config, preprocessing), np.random.default_rng(0)
    seconds = dict.fromkeys(("decode", "flip and resize", "masks", "collate"), 0.0)

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        seconds[stage] += (time.perf_counter() - start) / images
        return result

    waiting: list[Sample] = []
    for number in range(images):
        record = dataset.images[number % len(dataset.images)]
        view = augmentation.view((record.height, record.width), rng)
        decoded = timed("decode", lambda record=record: read_image(record.path))
        image = timed("flip and resize", lambda decoded=decoded, view=view: augmentation.image(decoded, view, rng))
        objects = timed("masks", lambda record=record, view=view: objects_in_view(record, view, config.least_visible))
        waiting.append(Sample(record.id, image, objects, 0))
        if len(waiting) == _BATCH_SIZE:
            timed("collate", lambda waiting=waiting: collate(waiting, preprocessing.divisor))
            waiting = []
    return seconds


def sample_seconds(dataset: CocoDataset, preprocessing: Preprocessing, augment: AugmentConfig, images: int) -> float:
    """Measure seconds per sample, without collating.

    Raises:
        UserError: if a file cannot be used.
    """
    samples = TrainingSamples(dataset, preprocessing, augment=augment, seed=0)
    start = time.perf_counter()
    for number in range(images):
        found = samples[number // len(samples), number % len(samples)]
        if isinstance(found, UserError):
            raise found
    return (time.perf_counter() - start) / images


def loader_rate(dataset: CocoDataset, preprocessing: Preprocessing, workers: int, images: int) -> float:
    """Measure images per second of the loader, with its workers started and warm.

    Raises:
        UserError: if a file cannot be used.
    """
    samples = TrainingSamples(dataset, preprocessing, seed=0)
    loader, sampler = training_loader(samples, batch_size=_BATCH_SIZE, workers=workers, pin_memory=False)
    count, start, batches = 0, None, -(-images // _BATCH_SIZE)
    while count < batches:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            if start is None:
                start = time.perf_counter()  # after the first batch, which includes the start of the workers
                continue
            count += 1
            if count == batches:
                break
        sampler.epoch += 1
    return count * _BATCH_SIZE / (time.perf_counter() - start)


# --- a file of COCO size ---------------------------------------------------------------------------

_COCO_IMAGES, _COCO_OBJECTS = 118_287, 860_001  # of train2017
_SIZE_HW = (480, 640)
_OUTLINES = 1000  # different objects
_LOADERS = {
    "pycocotools": ("from pycocotools.coco import COCO", "COCO(root + '/annotations/instances_train.json')"),
    "maskrcnn, first": ("from maskrcnn.data.coco import CocoDataset", "CocoDataset.load(root, 'train')"),
    "maskrcnn, cached": ("from maskrcnn.data.coco import CocoDataset", "CocoDataset.load(root, 'train')"),
}
_MEASURED = """
import sys, time
{imports}
root, start = sys.argv[1], (time.perf_counter(), time.process_time())
data = {load}
print("\\n", time.perf_counter() - start[0], time.process_time() - start[1], sep="\\n")
for line in open("/proc/self/status"):
    if line.startswith(("VmRSS", "VmHWM")):
        print(int(line.split()[1]) / 1024)
"""


def write_like_coco(root: str | Path, images: int) -> int:
    """Writes a dataset with as many polygons per image and vertices per polygon as COCO's train2017.

    The images are links to a few files. Returns the size of the annotation file in bytes.
    """
    rng, root = np.random.default_rng(0), Path(root)
    (root / "train").mkdir(parents=True)
    (root / "annotations").mkdir()
    noise = Image.fromarray(rng.integers(0, 256, (*(side // 16 for side in _SIZE_HW), 3), np.uint8))
    image = noise.resize(_SIZE_HW[::-1])
    names = [f"{number:012d}.jpg" for number in range(1, images + 1)]
    for number, name in enumerate(names):
        if number % 10_000 == 0:  # file systems limit the links to a file
            target = root / "train" / name
            image.save(target)
        else:
            (root / "train" / name).hardlink_to(target)
    entries = [
        {"license": 3, "file_name": name, "coco_url": f"http://images.cocodataset.org/train2017/{name}", "id": number}
        | {"height": _SIZE_HW[0], "width": _SIZE_HW[1], "date_captured": "2013-11-14 11:18:45"}
        | {"flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg"}
        for number, name in enumerate(names, start=1)
    ]
    outlines = []
    for _ in range(_OUTLINES):
        corners, radius = rng.integers(8, 63), rng.uniform(5, 60)
        angles, centre = np.sort(rng.random(corners)) * 2 * np.pi, rng.uniform((60, 60), (580, 420))
        points = centre + radius * rng.uniform(0.7, 1, (corners, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
        points = points.round(2)
        low, high = points.min(axis=0), points.max(axis=0)
        box, area = [*low.tolist(), *(high - low).round(2).tolist()], round(2.2 * radius**2, 4)
        fields = {"segmentation": [points.ravel().tolist()], "area": area, "iscrowd": 0, "bbox": box}
        outlines.append(json.dumps(fields, separators=(",", ":"))[:-1])
    count = round(images * _COCO_OBJECTS / _COCO_IMAGES)
    chosen, owners = rng.integers(0, _OUTLINES, count).tolist(), rng.integers(1, images + 1, count).tolist()
    labels = rng.integers(1, 81, count).tolist()
    path = root / "annotations" / "instances_train.json"
    with open(path, "w") as file:
        file.write(f'{{"images": {json.dumps(entries)}, "annotations": [')
        for k in range(count):
            ids = f'"image_id":{owners[k]},"category_id":{labels[k]},"id":{k + 1}}}'
            file.write(f"{',' if k else ''}{outlines[chosen[k]]},{ids}")
        file.write(f'], "categories": {json.dumps([{"id": k, "name": f"class {k}"} for k in range(1, 81)])}}}')
    return path.stat().st_size


def loading(root: Path) -> dict[str, tuple[float, float, float, float]]:
    """Seconds, CPU seconds, and final and peak MiB of each way to load a dataset in a new process."""
    found = {}
    for name, (imports, load) in _LOADERS.items():
        command = [sys.executable, "-c", _MEASURED.format(imports=imports, load=load), str(root)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, cpu_seconds, most, now = map(float, output.splitlines()[-4:])
        found[name] = (seconds, cpu_seconds, now, most)
    return found


def process_memory(dataset: CocoDataset, workers: int, samples: int) -> tuple[float, float]:
    """MiB of this process before it starts loader processes, and of all processes together after their samples.

    Shared pages count once: the sum of the proportional set sizes.
    """
    training = TrainingSamples(dataset, Preprocessing(min_size_px=64, max_size_px=128), seed=0)
    loader, sampler = training_loader(training, batch_size=_BATCH_SIZE, workers=workers, pin_memory=False)
    gc.collect()
    before, left = _proportional_mib(os.getpid()), -(-workers * samples // _BATCH_SIZE)
    while left > 0:
        for _ in zip(range(left), batches := iter(loader), strict=False):
            left -= 1
        sampler.epoch += 1
    processes = [os.getpid(), *(each.pid for each in multiprocessing.active_children())]
    together = sum(map(_proportional_mib, processes))
    del batches
    return before, together


def _proportional_mib(pid: int | None) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def compare_loading(images: int, workers: int, samples: int) -> None:
    """Print the tables of loading times and of process memory."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MASKRCNN_CACHE"] = f"{folder}/cache"
        # In a new process: otherwise its memory would count towards the training process.
        size = call_in_new_process("data:write_like_coco", {"root": f"{folder}/many", "images": images})
        print(f"{images} images, {size / 1e6:.0f} MB of annotations")
        print(f"{'loaded by':22}{'seconds':>10}{'CPU s':>10}{'MiB after':>12}{'MiB at most':>13}", flush=True)
        for name, (seconds, cpu_seconds, now, most) in loading(Path(folder, "many")).items():
            print(f"{name:22}{seconds:10.2f}{cpu_seconds:10.2f}{now:12.0f}{most:13.0f}", flush=True)
        write_like_coco(Path(folder, "few"), 64)
        print(f"\n{f'training, {workers} workers':22}{'MiB before':>12}{'MiB together':>14}")
        for name in ("few", "many"):
            before, together = process_memory(CocoDataset.load(Path(folder, name), "train"), workers, samples)
            shown = f"{64 if name == 'few' else images} images"
            print(f"{shown:22}{before:12.0f}{together:14.0f}", flush=True)


def step_memory_mb(objects: int) -> float | None:
    """Memory growth in MB from losses and gradients of ResNet-50 FPN, for one image with this number of objects."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, size = MaskRCNN(ModelConfig(class_names=("a", "b"), category_ids=(1, 2))), torch.tensor((1333.0, 800.0))
    corners = torch.rand(objects, 2) * (size - 64)
    boxes = torch.cat([corners, corners + 8 + 56 * torch.rand(objects, 2)], dim=1)[None]
    truth = {"boxes": boxes, "mask_frames": boxes, "keypoints": torch.zeros(1, objects, 0, 3)} | {
        "labels": torch.randint(1, 3, (1, objects)),
        "valid": torch.ones(1, objects, dtype=torch.bool),
        "masks": torch.full((1, objects, MASK_SIDE, MASK_SIDE), 255, dtype=torch.uint8),
        "seeds": torch.tensor([1]),
    }
    images = 255 * torch.rand(1, 3, 800, 1344)

    def step() -> None:
        torch.stack([*model.losses(images, torch.tensor([[800, 1333]]), truth, LossConfig()).values()]).sum().backward()

    return memory_growth_mb(step)


def main() -> None:
    """Measure and print the tables and the machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "dataset", type=Path, nargs="?", help="COCO-format folder; default: a generated one of COCO's size"
    )
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument(
        "--min-size", type=int, default=800, help="shorter side of the resized images, px; default: 800"
    )
    parser.add_argument("--images", type=int, help="images per measurement, or in the generated dataset; default: 200")
    parser.add_argument("--workers", type=int, help="loader processes; default: 2, or 8 for the generated dataset")
    parser.add_argument(
        "--samples", type=int, default=2000, help="samples per process, for the generated dataset; default: 2000"
    )
    methods = multiprocessing.get_all_start_methods()
    parser.add_argument(
        "--start-method", choices=methods, default=methods[0], help="start method of the loader processes"
    )
    parser.add_argument(
        "--objects", type=numbers, default=(), help="measure only the memory of a step, for these numbers of objects"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker
    with report_errors():
        if given.objects:
            for objects in given.objects:
                peak = call_in_new_process("data:step_memory_mb", {"objects": objects})
                print(f"{objects:6} objects{peak:8.0f} MB", flush=True)
            print(json.dumps(environment()))
            return
        if given.dataset is None:
            multiprocessing.set_start_method(given.start_method, force=True)
            compare_loading(given.images or _COCO_IMAGES, given.workers or 8, given.samples)
            print(json.dumps(environment()))
            return
        given.images, given.workers = given.images or 200, given.workers if given.workers is not None else 2
        dataset = CocoDataset.load(given.dataset, find_split(given.dataset, given.split))
        preprocessing = Preprocessing(min_size_px=given.min_size, max_size_px=round(given.min_size * 1333 / 800))
        seconds = _stage_seconds(dataset, preprocessing, given.images)
        print(f"{'stage':22}{'ms per image':>14}{'images/s':>12}")
        for stage, value in {**seconds, "all stages": sum(seconds.values())}.items():
            print(_line(stage, value))
        print(f"\n{'sample with':22}{'ms per image':>14}{'images/s':>12}")
        for name, values in AUGMENTATIONS.items():
            print(_line(name, sample_seconds(dataset, preprocessing, AugmentConfig(**values), given.images)))
        rate = loader_rate(dataset, preprocessing, given.workers, given.images)
        print(f"\nloader, {given.workers} worker(s): {rate:.1f} images/s")
    print(json.dumps(environment()))


def _line(name: str, seconds: float) -> str:
    return f"{name:22}{1000 * seconds:14.2f}{1 / max(seconds, 1e-9):12.1f}"


if __name__ == "__main__":
    main()
