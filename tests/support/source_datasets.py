"""Small datasets in each source format, as input of the converters."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from maskrcnn.data.convert.conversion import convert, split_plan
from maskrcnn.data.convert.source import Options


def noise_image(path, size_hw, seed=0, **options):
    """Writes an image of noise; each seed gives other bytes, so that images are not duplicates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size_hw, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def numbers(path, rows, dtype=np.uint8):
    """Writes a PNG with one number per pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(rows, dtype)).save(path)
    return path


def colour_16_bit(path, pixels):
    """Writes a PNG with 16 bits per channel from `[H, W, 3]`, which Pillow cannot write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def written_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def converted(kind, source, out, *, split=("train=0.5",), rest="val", keep_going=False, copies=False, **options):
    """Converts a dataset; by default half of the images are `train` and the rest `val`."""
    plan = split_plan(split, rest=rest)
    return convert(kind, source, out, options=Options(**options), plan=plan, keep_going=keep_going, copies=copies)


def content(out, split):
    return json.loads((Path(out) / "annotations" / f"instances_{split}.json").read_text())


def whole(kind, source, out, **options):
    """Converts a dataset to one split; returns its annotation file and the report."""
    report = converted(kind, source, out, split=(), rest="all", **options)
    return content(out, "all"), report


def as_it_is(kind, source, out, **options):
    """Converts a dataset with its own splits."""
    return converted(kind, source, out, split=(), rest=None, **options)


# --- one dataset of each kind --------------------------------------------------------------------------

BIRD = """<annotation>
  <filename>{stem}.jpg</filename>
  <size><width>12</width><height>8</height><depth>3</depth></size>
  <object><name>bird</name><truncated>1</truncated><difficult>0</difficult>
    <part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>
    <bndbox><xmin>1</xmin><ymin>2</ymin><xmax>4</xmax><ymax>8</ymax></bndbox></object>
  <object><name>cat</name><difficult>1</difficult>
    <bndbox><xmin>6</xmin><ymin>3</ymin><xmax>12</xmax><ymax>5</ymax></bndbox></object>
</annotation>
"""


def voc(root):
    """Two images of 8 × 12 px with a truncated bird and a difficult cat, with boxes and masks."""
    for number, (stem, name) in enumerate((("000001", "train"), ("000002", "val"))):
        noise_image(root / "JPEGImages" / f"{stem}.jpg", (8, 12), number)
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{stem}.xml").write_text(BIRD.format(stem=stem))
        for task in ("Main", "Segmentation"):
            (root / "ImageSets" / task).mkdir(parents=True, exist_ok=True)
            (root / "ImageSets" / task / f"{name}.txt").write_text(f"{stem}\n")
        objects = np.zeros((8, 12), np.uint8)
        objects[1:8, 0:4] = 255
        objects[2:7, 1:3] = 1
        objects[2:5, 6:11] = 2
        numbers(root / "SegmentationObject" / f"{stem}.png", objects)
        classes = np.array([0, 3, 8])[np.where(objects == 255, 0, objects)]  # bird and cat
        numbers(root / "SegmentationClass" / f"{stem}.png", np.where(objects == 255, 255, classes))
    return root


def visual_genome(root):
    noise_image(root / "VG_100K" / "2.jpg", (20, 30), 1)
    noise_image(root / "VG_100K_2" / "5.jpg", (20, 30), 2)
    objects = [
        {
            "image_id": 2,
            "objects": [
                {"object_id": 11, "x": 3, "y": 4, "w": 10, "h": 5, "names": ["Man."]},
                {"object_id": 12, "x": 20, "y": 10, "w": 50, "h": 6, "names": ["tree"]},
                {"object_id": 13, "x": 0, "y": 0, "w": 6, "h": 7, "names": ["cloud"]},
            ],
        },
        {
            "image_id": 5,
            "objects": [
                {"object_id": 14, "x": 1, "y": 2, "w": 3, "h": 4, "names": ["person"]},
                {"object_id": 15, "x": 5, "y": 5, "w": 5, "h": 5, "names": ["tree"]},
            ],
        },
    ]
    written_json(root / "objects.json", objects)
    sizes = [{"image_id": image_id, "width": 30, "height": 20} for image_id in (2, 5)]
    written_json(root / "image_data.json", sizes)
    return root


def penn_fudan(root):
    rows = np.zeros((6, 8), np.uint8)
    rows[1:4, 1:3] = 1
    rows[2:6, 5:8] = 2
    for number, stem in enumerate(("FudanPed00001", "PennPed00002")):
        noise_image(root / "PNGImages" / f"{stem}.png", (6, 8), number)
        numbers(root / "PedMasks" / f"{stem}_mask.png", rows)
    return root


def synthia(root):
    pixels = np.zeros((6, 8, 3), np.uint16)
    pixels[..., 0] = 3  # road
    pixels[1:4, 1:4, :2] = 8, 300  # a car whose number needs both bytes
    pixels[3:6, 5:8, :2] = 10, 44  # a pedestrian; 300 and 44 have the same low byte
    pixels[0, :3, :2] = 8, 0  # cars without a number
    for number, name in enumerate(("0000000.png", "0000001.png")):
        noise_image(root / "RGB" / name, (6, 8), number)
        colour_16_bit(root / "GT" / "LABELS" / name, pixels)
    return root


def cityscapes(root):
    rows = np.full((6, 8), 7, np.int32)  # road
    rows[1:4, 1:3] = 26000
    rows[1:4, 3:5] = 26001
    rows[4:6, 0:3] = 24  # a group of persons
    rows[4:6, 5:7] = 29000  # a caravan, which the benchmark does not count
    for number, (split, city) in enumerate((("train", "aachen"), ("val", "ulm"), ("test", "bonn"))):
        stem = f"{city}_000000_000019"
        noise_image(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", (6, 8), number)
        path = root / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png"
        numbers(path, rows, np.uint16)
        numbers(path.with_name(f"{stem}_gtFine_labelIds.png"), rows % 256)
    return root


def id_masks(root):
    for number, stem in enumerate("ab"):
        noise_image(root / "images" / f"{stem}.jpg", (6, 8), number)
        rows = np.zeros((6, 8), np.uint8)
        rows[1:5, 1:5] = 7
        rows[2:4, 2:4] = 0  # a hole
        rows[5, 6:8] = 9
        numbers(root / "masks" / f"{stem}.png", rows)
    return root


def mask_files(root):
    for number, name in enumerate(("0a1b", "2c3d")):
        noise_image(root / name / "images" / f"{name}.png", (6, 8), number)
        for k, window in enumerate((np.s_[1:3, 1:4], np.s_[4:6, 0:8])):
            rows = np.zeros((6, 8), np.uint8)
            rows[window] = 255
            numbers(root / name / "masks" / f"{k}f.png", rows)
    return root


def labelme_file(path, image, size_hw, *shapes, **fields):
    """A LabelMe file with shapes of (label, kind, points, and maybe further fields)."""
    made = [
        {
            "label": label,
            "points": points,
            "group_id": None,
            "shape_type": kind,
            "flags": {},
            **(more[0] if more else {}),
        }
        for label, kind, points, *more in shapes
    ]
    head = {"version": "5.4.1", "flags": {}, "shapes": made, "imagePath": image, "imageData": None}
    return written_json(path, {**head, "imageHeight": size_hw[0], "imageWidth": size_hw[1], **fields})


TRIANGLE = [[1, 1], [9, 1.5], [5, 9]]


def labelme(root):
    for number, stem in enumerate("ab"):
        noise_image(root / f"{stem}.jpg", (20, 30), number)
        labelme_file(
            root / f"{stem}.json",
            f"{stem}.jpg",
            (20, 30),
            ("leaf", "polygon", TRIANGLE),
            ("stone", "rectangle", [[20, 12], [12, 4]]),
            ("leaf", "polygon", [[2, 12], [6, 12], [6, 16]], {"group_id": 4}),
            ("leaf", "rectangle", [[8, 12], [11, 18]], {"group_id": 4}),
        )
    return root


def via_region(name, attributes, **shape):
    return {"shape_attributes": {"name": name, **shape}, "region_attributes": attributes}


def via(root):
    regions = [
        via_region("polygon", {"kind": "leaf"}, all_points_x=[1, 9, 5], all_points_y=[1, 1, 9]),
        via_region("rect", {"kind": "stone"}, x=12, y=4, width=8, height=9),
    ]
    images = {}
    for number, name in enumerate(("b.jpg", "a.jpg")):
        noise_image(root / name, (20, 30), number)
        images[f"{name}123"] = {"filename": name, "size": 123, "regions": regions, "file_attributes": {}}
    written_json(root / "via_project.json", {"_via_settings": {}, "_via_img_metadata": images, "_via_attributes": {}})
    return root


def coco(root):
    """Splits train2014 and val2014 with two and four images, and additional fields."""
    categories = [{"id": 1, "name": "person", "supercategory": "person"}, {"id": 18, "name": "dog"}]
    first = 1
    for split, ids in (("train2014", (100, 101)), ("val2014", (42, 73, 139, 285))):
        images, annotations = [], []
        for image_id in ids:
            name = f"COCO_{split}_{image_id:012d}.jpg"
            noise_image(root / split / name, (10, 12), image_id)
            images.append({"id": image_id, "file_name": name, "height": 10, "width": 12, "license": 4})
            annotations.append(
                {
                    "id": first,
                    "image_id": image_id,
                    "category_id": 18,
                    "bbox": [1.5, 2.0, 4.0, 5.0],
                    "area": 17.25,
                    "iscrowd": 0,
                    "segmentation": [[1.5, 2.0, 5.5, 2.0, 5.5, 7.0, 1.5, 7.0]],
                    "num_keypoints": 0,
                }
            )
            first += 1
        whole_file = {"images": images, "annotations": annotations, "categories": categories}
        written_json(root / "annotations" / f"instances_{split}.json", whole_file)
    return root
