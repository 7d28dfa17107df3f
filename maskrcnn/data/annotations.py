"""A tolerant reader of annotation files in COCO's format, as various tools write them.

Training, evaluation, checks and conversions all use `read_annotations`, so that a file is read the same way
everywhere. Unusable entries are left out, and missing values are computed from other fields; both are counted by
reason in `Notes`. Only faults that make the whole file unusable are errors.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.data.segmentation import (
    NOTHING,
    AnnotationError,
    ParsedSegmentation,
    Segmentation,
    box_polygon,
    compressed_rle,
    finite_numbers,
    parse_segmentation,
)
from maskrcnn.errors import UserError
from maskrcnn.files import read_json
from maskrcnn.keypoints import COCO_NAMES

_FIX = "correct the file (format: cocodataset.org/#format-data)"
_LISTS = ("images", "annotations", "categories")
_VISIBILITIES = (0, 1, 2)  # visibility of keypoints: not labelled; labelled and hidden; labelled and visible
_INTEGER = re.compile(r"[+-]?\d{1,18}")
_MAX_ID = 2**63
_MAX_SIDE_PX = 1_000_000  # maximum side of an image; larger values are treated as errors
_URL_KEYS = ("path", "filename", "name", "coco_url", "flickr_url", "url")  # alternatives to file_name
SAMPLE = 2000  # number of annotations from which the box convention is determined
_FIT_PX = 2.0  # maximum distance of a box from the extent of its polygons, to recognise its convention
_POLYGONS = {
    "polygon fractions": "polygons that are fractions of the image",
    "polygon yx": "polygons written as (y, x), not (x, y)",
}
_KEPT_NOTES = 200  # number of notes per reason to keep in full; all are counted

DROPPED, BOX_ONLY, REPAIRED = "dropped", "box only", "repaired"


@dataclass(frozen=True)
class Note:
    """An entry of a file that was left out or changed."""

    outcome: str  # DROPPED, BOX_ONLY (an object without its mask) or REPAIRED
    reason: str  # kind of fault
    name: str  # "annotation 7"
    detail: str
    image_id: int | None = None  # None: unknown image, or a fault of another entry
    bbox: Any = None  # the file's


class Notes:
    """The notes of a file, counted by outcome and reason."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._kept: dict[tuple[str, str], list[Note]] = {}

    def add(self, note: Note) -> None:
        """Counts a note; keeps all of dropped entries, but only the first of other outcomes."""
        key = note.outcome, note.reason
        self._counts[key] += 1
        kept = self._kept.setdefault(key, [])
        if note.outcome == DROPPED or len(kept) < _KEPT_NOTES:
            kept.append(note)

    def counts(self, *outcomes: str) -> dict[str, int]:
        """Number of notes by reason, for some or all outcomes."""
        found: Counter[str] = Counter()
        for (outcome, reason), count in self._counts.items():
            if not outcomes or outcome in outcomes:
                found[reason] += count
        return dict(found)

    def of(self, outcome: str) -> list[Note]:
        """The kept notes of an outcome."""
        return [note for (kind, _), notes in self._kept.items() if kind == outcome for note in notes]

    def to_json(self) -> list[Any]:
        """The notes as JSON data, which `from_json` reads."""
        return [
            [*key, self._counts[key], [[*vars(note).values()][2:] for note in kept]] for key, kept in self._kept.items()
        ]

    @classmethod
    def from_json(cls, content: list[Any]) -> Notes:
        """The notes from the data of `to_json`."""
        notes = cls()
        for outcome, reason, count, kept in content:
            notes._counts[outcome, reason] = count
            notes._kept[outcome, reason] = [Note(outcome, reason, *values) for values in kept]
        return notes

    def lines(self, source: object) -> list[str]:
        """One line of text for each outcome and reason, with the first example."""
        texts = {
            DROPPED: "skipped {} annotation(s)",
            BOX_ONLY: "{} object(s) with a box but no usable mask",
            REPAIRED: "repaired {} entries",
        }
        return [
            f"{source}: {texts[outcome].format(count)}: {reason}, first: {first.name}: {first.detail}"
            for outcome in texts
            for (kind, reason), count in self._counts.items()
            if kind == outcome
            for first in self._kept[kind, reason][:1]
        ]


def usable_id(value: Any) -> int | str | None:
    """Normalizes an id: integers, also written as text or as 1.0, become int; other texts are kept; else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return value if abs(value) < _MAX_ID else str(value)
    if not isinstance(value, str):
        return None
    text = value.strip()
    return int(text) if _INTEGER.fullmatch(text) else text or None


def category_key(annotation: Any) -> int | str | None:
    """The category id of an entry of `annotations`, see `usable_id`."""
    return usable_id(annotation.get("category_id")) if isinstance(annotation, dict) else None


# --- annotation files --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageEntry:
    """An image of an annotation file."""

    file_name: str  # as in the file, with slashes; the last part of a URL
    height: int  # px
    width: int
    index: int  # in the file's list


@dataclass(frozen=True, eq=False)
class ObjectEntry:
    """An annotated object, or a crowd region."""

    annotation_id: int  # unique and positive
    image_id: int
    category_id: int
    bbox_xywh: tuple[float, float, float, float]  # px, not clipped to the image
    box_xyxy: tuple[float, float, float, float]  # px, clipped to the image
    segmentation: Segmentation  # for an object without a usable mask: the pixels of its box
    has_mask: bool
    is_crowd: bool
    area: float  # px²; from the file, else of the mask, else of the box
    keypoints: np.ndarray | None  # see `checked_keypoints`
    stated_keypoints: int | None  # the file's `num_keypoints`
    index: int  # in the file's list


@dataclass(frozen=True, eq=False)
class CategoryKeypoints:
    """The keypoints of a file's categories."""

    names: tuple[str, ...] = ()  # the same in all categories with keypoints; (): no usable keypoints
    skeleton: tuple[tuple[int, int], ...] = ()  # pairs of keypoint numbers, which start at 1
    category_ids: frozenset[int] = frozenset()  # of the categories with keypoints
    fault: UserError | None = None  # why the keypoints of the file cannot be used


@dataclass(frozen=True, eq=False)
class AnnotationFile:
    """The usable content of an annotation file."""

    source: str  # file name
    categories: dict[int, str]  # id -> name, in ascending order of the ids
    images: dict[int, ImageEntry]  # by id, in the order of the file
    objects: list[ObjectEntry]  # in the order of the file
    keypoints: CategoryKeypoints
    has_masks: bool  # False: no annotation has a segmentation
    notes: Notes
    image_keys: dict[str, int] = field(default_factory=dict)  # numbers given to image ids that are texts
    category_keys: dict[str, int] = field(default_factory=dict)


# Size (height, width) of an image whose entry does not give it; None if it is not known.
SizeOf = Callable[[str, Sequence[str]], "tuple[int, int] | None"]


def read_annotations(
    content: Any,
    source: str,
    *,
    size_of: SizeOf = lambda file_name, names: None,
    drop_roots: bool = True,
) -> AnnotationFile:
    """Reads the content of an annotation file.

    Annotations of an unknown image or category, or with neither a usable box nor a usable mask, are left out and
    counted. An object with a box but without a usable mask is kept as a box; in a file without any segmentation, all
    are. Missing or malformed boxes, areas, crowd flags, sizes and class names are computed and counted.

    Args:
        content: the parsed JSON.
        source: file name, for errors and notes.
        size_of: returns (height, width) for a `file_name`, given the names of all images, if its entry has no size.
        drop_roots: leave out categories without annotations that are the `supercategory` of others (as exported by
            Roboflow).

    Raises:
        UserError: for content of another structure, and for two images or classes with the same id.
    """
    images, annotations, categories = entries_of(content, source)
    reader = Reader(images, list(enumerate(annotations)), categories, source, size_of)
    used = {key for key in map(category_key, annotations) if key is not None}
    names, keypoints = reader.classes(used, drop_roots=drop_roots)
    by_id = reader.images()
    placed = list(reader.placed(by_id, names))
    by_id = reader.sized(by_id, placed)
    objects, has_masks = reader.objects(placed, by_id, keypoints)
    return AnnotationFile(
        source=source,
        categories=names,
        images=by_id,
        objects=objects,
        keypoints=keypoints,
        has_masks=has_masks,
        notes=reader.notes,
        image_keys=reader.image_keys,
        category_keys=reader.category_keys,
    )


def load_annotations(path: Path) -> Any:
    """The JSON content of an annotation file.

    Raises:
        UserError: if the file does not exist, or is not JSON.
    """
    if not path.exists():
        raise UserError(
            f"annotation file {path} does not exist",
            "a JSON file in COCO's format",
            "correct the path, or give the dataset's folder with --data",
        )
    return read_json(path, "a complete JSON file in COCO's format")


def entries_of(content: Any, source: str) -> tuple[list[Any], list[Any], list[Any]]:
    """The lists `images`, `annotations` and `categories`; missing or null annotations and categories are empty.

    Raises:
        UserError: for content of another structure; the message includes the format that it looks like.
    """
    if not isinstance(content, dict):
        raise UserError(
            f"{source}: the file is of type {type(content).__name__}{looks_like(content)}",
            "an object with the lists images, annotations and categories",
            _FIX,
        )
    lists = []
    for name in _LISTS:
        value = content.get(name)
        if value is None and name != "images":
            value = []
        if not isinstance(value, list):
            kind = "has no key" if name not in content else f"is of type {type(value).__name__} at"
            raise UserError(f"{source}: the file {kind} {name!r}{looks_like(content)}", f"{name!r}: a list", _FIX)
        lists.append(value)
    first = lists[1][0] if lists[1] else None
    if isinstance(first, dict) and "segments_info" in first and "category_id" not in first:
        raise UserError(
            f"{source}: panoptic annotations ('segments_info')",
            "annotations of instances, each with its category and segmentation",
            "use COCO's instances_*.json, or export instances",
        )
    return lists[0], lists[1], lists[2]


_LABEL_STUDIO = {"annotations", "completions", "predictions"}  # besides "data" in its tasks


def looks_like(content: Any) -> str:
    """A hint about the format of content that is not COCO's."""
    first = content[0] if isinstance(content, list) and content else content
    if isinstance(content, list) and isinstance(first, dict) and {"image_id", "score"} <= first.keys():
        return " (it looks like detections in COCO's results format: evaluate --results)"
    if isinstance(content, dict) and "shapes" in content:
        return " (it looks like a LabelMe file: maskrcnn data convert labelme FOLDER OUT)"
    values = list(islice(content.values(), 1)) if isinstance(content, dict) else []
    if "_via_img_metadata" in (content if isinstance(content, dict) else {}) or (
        values and isinstance(values[0], dict) and "regions" in values[0]
    ):
        return " (it looks like a file of VGG Image Annotator: maskrcnn data convert via FILE OUT)"
    if isinstance(content, list) and isinstance(first, dict) and "data" in first and first.keys() & _LABEL_STUDIO:
        return " (it looks like Label Studio's own JSON: export as COCO there)"
    if isinstance(content, dict) and ("projectType" in content or "classTitle" in str(content.get("objects"))[:2000]):
        return " (it looks like Supervisely's format: export as COCO there)"
    if isinstance(content, dict) and isinstance(content.get("items"), list):
        return " (it looks like Datumaro's format: maskrcnn data convert datumaro:datumaro FOLDER OUT)"
    return ""


class UnlikeCocoError(Exception):
    """The objects of a file were read as plain ones, but the file uses another convention."""


class PlainObjects(NamedTuple):
    """Facts about the annotations that are not passed to `Reader`, as they need no repair."""

    number: int = 0
    have_masks: bool = False
    largest_id: int = 0
    first: Sequence[Any] = ()  # the first, as `Reader.placed` gives them


class Reader:
    """Reads the entries of one file, see `read_annotations`; call its methods in the order of their definition.

    Args:
        images: entries of the file.
        annotations: index and entry of each.
        categories: entries of the file.
        source: file name, for errors and notes.
        size_of: see `read_annotations`.
    """

    def __init__(
        self,
        images: list[Any],
        annotations: Sequence[tuple[int, Any]],
        categories: list[Any],
        source: str,
        size_of: SizeOf,
    ) -> None:
        self.source, self.size_of, self.notes = source, size_of, Notes()
        self.image_entries, self.annotations, self.category_entries = images, annotations, categories
        self.image_keys: dict[str, int] = {}
        self.category_keys: dict[str, int] = {}

    def classes(self, used: set[int | str], *, drop_roots: bool) -> tuple[dict[int, str], CategoryKeypoints]:
        """Names by id, in ascending order of the ids, and the keypoints.

        Args:
            used: category ids of the annotations, see `category_key`.
            drop_roots: see `read_annotations`.
        """
        categories, by_id = self._categories(used)
        in_use = {self._known(key, self.category_keys, categories) for key in used}
        if drop_roots:
            for category_id in _unused_roots(by_id, in_use):
                name = categories.pop(category_id)
                self._note(REPAIRED, "super-category without objects left out of the classes", "category", repr(name))
                del by_id[category_id]
        taken = set[str]()  # counts and metrics are reported by class name
        for category_id in sorted(categories, key=lambda key: (key not in in_use, key)):
            name = categories[category_id]
            if name in taken:
                self._note(REPAIRED, "class name of another category", f"category id {category_id}", repr(name))
                categories[category_id] = f"{name} (id {category_id})"
            taken.add(name)
        keypoints = read_keypoints(self.source, self._with_keypoint_names(by_id))
        return dict(sorted(categories.items())), keypoints

    def _note(self, outcome: str, reason: str, name: str, detail: str, **more: Any) -> None:
        self.notes.add(Note(outcome, reason, name, detail, **more))

    @staticmethod
    def _known(key: int | str | None, keys: Mapping[str, int], known: Mapping[int, Any]) -> int | None:
        """The id for a usable key; None if it is unknown."""
        number = keys.get(key) if isinstance(key, str) else key
        return number if number in known else None

    def _ids(self, entries: list[Any], what: str, keys: dict[str, int]) -> list[tuple[int, int, dict[str, Any]]]:
        """The index, id and entry of all usable entries; texts are numbered after the integers, into `keys`."""
        found = []
        for index, entry in enumerate(entries):
            name = f"{what} number {index}"
            key = usable_id(entry.get("id")) if isinstance(entry, dict) else None
            if key is None:
                detail = f"id {entry.get('id')!r}" if isinstance(entry, dict) else f"of type {type(entry).__name__}"
                self._note(REPAIRED, f"{what} without a usable id left out", name, detail)
                continue
            if type(entry["id"]) is not int:
                self._note(REPAIRED, f"{what} id that is not an integer", name, f"id {entry['id']!r}")
            found.append((index, key, entry))
        following = 1 + max((key for _, key, _ in found if isinstance(key, int)), default=0)
        numbered = []
        for index, key, entry in found:
            if isinstance(key, str) and key not in keys:
                keys[key], following = following, following + 1
            numbered.append((index, keys[key] if isinstance(key, str) else key, entry))
        return numbered

    def _categories(self, used: set[int | str]) -> tuple[dict[int, str], dict[int, dict[str, Any]]]:
        """Names and entries by id. For a file without categories, they are taken from its annotations."""
        if not self.category_entries and used:
            self.category_entries = [{"id": key, "name": str(key)} for key in sorted(used, key=str)]
            self._note(REPAIRED, "no categories: classes are named by the annotations' ids", "file", f"{len(used)} ids")
        names: dict[int, str] = {}
        by_id: dict[int, dict[str, Any]] = {}
        for index, category_id, entry in self._ids(self.category_entries, "category", self.category_keys):
            name = entry.get("name")
            if not isinstance(name, str) or not name.strip():
                found = f"id {category_id}, name {name!r}"
                name = str(name) if type(name) in (int, float) else f"category {category_id}"
                self._note(REPAIRED, "category without a name", f"category number {index}", found)
            if category_id in names and names[category_id] != name:
                found = f"category id {category_id} occurs twice, as {names[category_id]!r} and {name!r}"
                raise UserError(f"{self.source}: {found}", "unique category ids", _FIX)
            names[category_id], by_id[category_id] = name, {**entry, "id": category_id}
        if not names:
            raise UserError(f"{self.source}: no categories", "at least one entry in 'categories' with an id", _FIX)
        return names, by_id

    def _with_keypoint_names(self, by_id: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
        """The categories; if none has keypoint names but objects have keypoints, these get generated names."""
        entries = list(by_id.values())
        if any(entry.get("keypoints") for entry in entries):
            return entries
        values = (entry.get("keypoints") for _, entry in self.annotations if isinstance(entry, dict))
        lengths = Counter(len(value) for value in values if isinstance(value, list) and value)
        length = lengths.most_common(1)[0][0] if lengths else 0
        if not length or length % 3:
            return entries
        names = list(COCO_NAMES) if length == 3 * len(COCO_NAMES) else [str(k + 1) for k in range(length // 3)]
        found = f"{length // 3} keypoints, named {names[0]} … {names[-1]}"
        self._note(REPAIRED, "keypoints that no category names", "categories", found)
        return [{**entry, "keypoints": names} for entry in entries]

    def images(self) -> dict[int, ImageEntry]:
        """The images by id, in the order of the file; sizes that the file does not give are 0."""
        images: dict[int, ImageEntry] = {}
        has_names = any(isinstance(entry, dict) and _file_name(entry) for entry in self.image_entries)
        for index, image_id, entry in self._ids(self.image_entries, "image", self.image_keys):
            name = _file_name(entry)
            if name is None and not has_names:
                name = ""  # a file used only to score results
            if name is None:
                detail = f"file_name {entry.get('file_name')!r}"
                self._note(REPAIRED, "image without a file name left out", f"image number {index}", detail)
                continue
            if image_id in images:
                if images[image_id].file_name != name:
                    found = f"image id {image_id} occurs twice, for {images[image_id].file_name!r} and {name!r}"
                    raise UserError(f"{self.source}: {found}", "unique image ids", _FIX)
                self._note(REPAIRED, "image that is listed twice", f"image {image_id}", name)
                continue
            images[image_id] = ImageEntry(name, _side(entry.get("height")), _side(entry.get("width")), index)
        if not images:
            raise UserError(
                f"{self.source}: no images ({len(self.image_entries)} entries in 'images')",
                "at least one entry in 'images' with an id and a file_name",
                _FIX,
            )
        return images

    def placed(self, images: Mapping[int, ImageEntry], categories: Mapping[int, str]) -> Any:
        """(index, image id, category id, entry) of the annotations with known images and categories."""
        for index, entry in self.annotations:
            if not isinstance(entry, dict):
                self._note(DROPPED, "not an object", f"annotation number {index}", f"of type {type(entry).__name__}")
                continue
            name, bbox = _name(entry, index), entry.get("bbox")
            image_id = self._known(usable_id(entry.get("image_id")), self.image_keys, images)
            if image_id is None:
                self._note(DROPPED, "unknown image", name, f"image_id {entry.get('image_id')!r}", bbox=bbox)
                continue
            category_id = self._known(usable_id(entry.get("category_id")), self.category_keys, categories)
            if category_id is None:
                detail = f"category_id {entry.get('category_id')!r}"
                self._note(DROPPED, "unknown category", name, detail, image_id=image_id, bbox=bbox)
                continue
            yield index, image_id, category_id, entry

    def sized(self, images: dict[int, ImageEntry], placed: Sequence[Any]) -> dict[int, ImageEntry]:
        """The images with sizes: from the file, the image, its run lengths, or else the extent of its objects."""
        unknown = {image_id for image_id, entry in images.items() if not (entry.height and entry.width)}
        if not unknown:
            return images
        extents: dict[int, list[tuple[int, int]]] = {image_id: [(1, 1)] for image_id in unknown}
        encoded: dict[int, tuple[int, int]] = {}
        for _, image_id, _, entry in placed:
            if image_id not in unknown:
                continue
            segmentation = entry.get("segmentation")
            size = finite_numbers(segmentation.get("size")) if isinstance(segmentation, dict) else None
            if size is not None and size.size == 2 and 1 <= size.min() <= size.max() <= _MAX_SIDE_PX:
                encoded[image_id] = (int(size[0]), int(size[1]))
            box = finite_numbers(entry.get("bbox"))
            if box is not None and box.size == 4 and np.abs(box).max() < _MAX_SIDE_PX:
                extents[image_id].append((math.ceil(box[1] + abs(box[3])), math.ceil(box[0] + abs(box[2]))))
        sized, names = dict(images), [entry.file_name for entry in images.values()]
        for image_id in unknown:
            name = images[image_id].file_name
            size_hw = self.size_of(name, names)
            origin = "the image file" if size_hw else "its run lengths" if image_id in encoded else "its boxes"
            largest = (max(h for h, _ in extents[image_id]), max(w for _, w in extents[image_id]))
            height, width = size_hw or encoded.get(image_id) or largest
            self._note(
                REPAIRED, f"image size missing, taken from {origin}", f"image {image_id}", f"{width}×{height} px"
            )
            sized[image_id] = replace(images[image_id], height=height, width=width)
        return sized

    def objects(
        self,
        placed: Sequence[Any],
        images: Mapping[int, ImageEntry],
        keypoints: CategoryKeypoints,
        plain: PlainObjects = PlainObjects(),  # noqa: B008
    ) -> tuple[list[ObjectEntry], bool]:
        """The objects, and whether the file has any usable mask.

        Raises:
            UnlikeCocoError: if there are plain objects, but the boxes of the file do not follow COCO's convention.
        """
        segmentations = [
            parse_segmentation(entry.get("segmentation"), images[image_id].height, images[image_id].width)
            for _, image_id, _, entry in placed
        ]
        has_masks = any(each.segmentation is not None for each in segmentations)
        has_masks = has_masks or plain.have_masks or not (placed or plain.number)
        sample = sorted((*plain.first, *placed[:SAMPLE]), key=lambda each: each[0])[:SAMPLE]
        convention = self._convention(sample, images)
        if plain.number and convention != "xywh":
            raise UnlikeCocoError
        usable = (usable_id(entry.get("id")) for *_, entry in placed)
        following = 1 + max((key for key in usable if isinstance(key, int)), default=0)
        following, seen, objects = max(following, plain.largest_id + 1), set(), []
        for (index, image_id, category_id, entry), parsed in zip(placed, segmentations, strict=True):
            name = _name(entry, index)
            try:
                fields = self._fields(entry, name, images[image_id], parsed, convention, has_masks=has_masks)
            except AnnotationError as fault:
                detail, bbox = fault.detail, entry.get("bbox")
                self._note(DROPPED, fault.reason, name, detail, image_id=image_id, bbox=bbox)
                continue
            points, stated = None, None
            if category_id in keypoints.category_ids:
                try:
                    points = checked_keypoints(entry.get("keypoints"), len(keypoints.names))
                    stated = entry.get("num_keypoints")
                except AnnotationError as fault:
                    self._note(REPAIRED, f"{fault.reason}, left out of their object", name, fault.detail)
            annotation_id = usable_id(entry.get("id"))
            if not isinstance(annotation_id, int) or annotation_id <= 0 or annotation_id in seen:
                # pycocotools misreads these: in its matching, 0 means unmatched.
                annotation_id, following = following, following + 1
            seen.add(annotation_id)
            objects.append(
                ObjectEntry(
                    annotation_id=annotation_id,
                    image_id=image_id,
                    category_id=category_id,
                    keypoints=points,
                    stated_keypoints=stated if type(stated) is int else None,
                    index=index,
                    **fields,
                )
            )
        return objects, has_masks

    def _convention(self, sample: Sequence[Any], images: Mapping[int, ImageEntry]) -> str:
        """How boxes are written: "xywh" as in COCO, "xyxy" (corners), or "fractions" of the image.

        Corners are recognised by polygons that they fit, or else by boxes that would leave the image if read as COCO's.
        Polygons that fit COCO's boxes only if read so are "polygon fractions" of the image, or "polygon yx".
        """
        boxes, sizes, extents = [], [], []
        for _, image_id, _, entry in sample:
            box = finite_numbers(entry.get("bbox"))
            if box is None or box.size != 4:
                continue
            image = images[image_id]
            outline = parse_segmentation(entry.get("segmentation"), image.height, image.width).segmentation
            points = np.concatenate(outline).reshape(-1, 2) if isinstance(outline, list) else np.full((1, 2), np.nan)
            boxes.append(box)
            sizes.append((image.width, image.height))
            extents.append([*points.min(axis=0), *points.max(axis=0)])
        if not boxes:
            return "xywh"
        box, size, extent = np.array(boxes), np.array(sizes, float), np.array(extents)
        corners = np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1)
        if box.min() >= 0 and box.max() <= 1 and size.min() > 2 and not (extent > 1).any() and (box % 1).any():
            self._note(
                REPAIRED, "coordinates that are fractions of the image", "file", f"first box {boxes[0].tolist()}"
            )
            return "fractions"
        outlined = ~np.isnan(extent[:, 0])
        is_corner_like = (box[:, 2:] > box[:, :2]).all()
        if outlined.any():
            as_xyxy = (np.abs(box - extent)[outlined].max(axis=1) <= _FIT_PX).mean()
            as_xywh = (np.abs(corners - extent)[outlined].max(axis=1) <= _FIT_PX).mean()
            is_xyxy = as_xyxy > 0.9 and as_xywh < 0.1
            if not is_xyxy and as_xywh < 0.5:
                others = {"polygon yx": extent[:, [1, 0, 3, 2]]}
                if (extent[outlined] <= 1).all():
                    others = {"polygon fractions": extent * np.tile(size, 2)}
                for convention, other in others.items():
                    if (np.abs(corners - other)[outlined].max(axis=1) <= _FIT_PX).mean() > 0.9:
                        self._note(
                            REPAIRED, _POLYGONS[convention], "file", f"first extent {extent[outlined][0].tolist()}"
                        )
                        return convention
        else:
            outside = (corners[:, 2:] > size + _FIT_PX).any(axis=1).mean()
            is_xyxy = bool(outside > 0.5 and is_corner_like and (box[:, 2:] <= size + _FIT_PX).all())
        if is_xyxy:
            found = f"first bbox {boxes[0].tolist()}"
            self._note(REPAIRED, "boxes written as corners (x1, y1, x2, y2), not (x, y, width, height)", "file", found)
        return "xyxy" if is_xyxy else "xywh"

    def _fields(
        self,
        entry: dict[str, Any],
        name: str,
        image: ImageEntry,
        parsed: ParsedSegmentation,
        convention: str,
        *,
        has_masks: bool,
    ) -> dict[str, Any]:
        """Box, mask, crowd flag and area of an annotation.

        Raises:
            AnnotationError: for an annotation that cannot be used.
        """
        height, width = image.height, image.width
        segmentation = parsed.segmentation
        if convention in ("fractions", "polygon fractions") and isinstance(segmentation, list):
            segmentation = [(part.reshape(-1, 2) * (width, height)).ravel() for part in segmentation]
        if convention == "polygon yx" and isinstance(segmentation, list):
            segmentation = [part.reshape(-1, 2)[:, ::-1].ravel() for part in segmentation]
        if segmentation is not None and parsed.reason:
            self._note(REPAIRED, parsed.reason, name, parsed.detail)
        bbox, box_fault, outline = self._bbox(entry, name, convention, (height, width))
        if segmentation is None and outline is not None and has_masks:
            segmentation = [outline]  # a rotated box is an outline
        box = None if bbox is None else _clipped(bbox, height, width)
        if box is None and segmentation is not None:
            extent = _extent(segmentation)
            box = _clipped(extent, height, width) if min(extent[2:]) > 0 else None
            if box is not None:
                reason = "box computed from the mask" if bbox is None else "box outside the image, taken from the mask"
                self._note(REPAIRED, reason, name, f"bbox {entry.get('bbox')!r}")
                bbox = tuple(extent)
        if bbox is None:
            raise AnnotationError("invalid box", f"{box_fault}; {parsed.reason}" if has_masks else box_fault)
        if box is None:
            raise AnnotationError("box outside the image", f"bbox {entry.get('bbox')!r}, image {width}×{height}")
        has_mask = segmentation is not None
        if segmentation is None:
            segmentation = box_polygon(box)
            if has_masks or parsed.reason != NOTHING:
                self._note(BOX_ONLY, parsed.reason, name, parsed.detail)
        return {
            "bbox_xywh": tuple(bbox),
            "box_xyxy": box,
            "segmentation": segmentation,
            "has_mask": has_mask,
            "is_crowd": self._crowd(entry, name),
            "area": self._area(entry, name, segmentation, bbox, has_mask=has_mask, size_hw=(height, width)),
        }

    def _bbox(
        self, entry: dict[str, Any], name: str, convention: str, size_hw: tuple[int, int]
    ) -> tuple[Sequence[float] | None, str, np.ndarray | None]:
        """COCO's box (x, y, width, height), or None and what was found; and the outline of a rotated box."""
        value = entry.get("bbox")
        numbers = finite_numbers(value)
        found = f"bbox {str(value)[:200]}"
        if numbers is None or numbers.size not in (4, 5):
            return None, found, None
        if convention == "fractions":
            numbers = numbers * [size_hw[1], size_hw[0], size_hw[1], size_hw[0], 1][: numbers.size]
        if convention == "xyxy" and numbers.size == 4:
            numbers[2:] -= numbers[:2]
        attributes = entry.get("attributes")
        angle: Any = attributes.get("rotation") if isinstance(attributes, dict) else None
        if numbers.size == 5:  # Detectron2's rotated boxes: centre, size, and degrees counterclockwise
            centre, degrees = numbers[:2], -float(numbers[4])
        elif type(angle) in (int, float) and math.isfinite(angle) and angle % 360:  # CVAT: clockwise
            centre, degrees = numbers[:2] + numbers[2:4] / 2, float(angle)
        else:
            x, y, width, height = numbers.tolist()
            if width == 0 or height == 0:
                return None, found, None
            if width < 0 or height < 0:
                self._note(REPAIRED, "box with a negative side: corners exchanged", name, found)
            return (min(x, x + width), min(y, y + height), abs(width), abs(height)), found, None
        half = np.abs(numbers[2:4]) / 2
        if not half.all():
            return None, found, None
        turned = math.radians(degrees)
        cos, sin = math.cos(turned), math.sin(turned)
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half @ np.array([[cos, sin], [-sin, cos]]) + centre
        low, high = corners.min(axis=0), corners.max(axis=0)
        self._note(REPAIRED, "rotated box: its outline and the upright box around it are used", name, found)
        return (*low.tolist(), *(high - low).tolist()), found, corners.ravel()

    def _crowd(self, entry: dict[str, Any], name: str) -> bool:
        value = entry.get("iscrowd", 0)
        if value in (0, 1):  # also accepts False, True and fractions
            return bool(value)
        known = {"0": False, "1": True, "false": False, "true": True}
        flag = known.get(value.strip().lower()) if isinstance(value, str) else None
        self._note(REPAIRED, "crowd flag that is not 0 or 1", name, f"iscrowd {value!r}, read as {int(bool(flag))}")
        return bool(flag)

    def _area(
        self,
        entry: dict[str, Any],
        name: str,
        segmentation: Segmentation,
        bbox: Sequence[float],
        *,
        has_mask: bool,
        size_hw: tuple[int, int],
    ) -> float:
        numbers = finite_numbers([entry.get("area")])
        if numbers is not None and numbers[0] > 0:
            return float(numbers[0])
        self._note(REPAIRED, "area missing or not positive, computed", name, f"area {entry.get('area')!r}")
        mask = int(mask_api.area(compressed_rle(segmentation, *size_hw))) if has_mask else 0
        return float(mask or bbox[2] * bbox[3])


def _name(entry: Mapping[str, Any], index: int) -> str:
    return f"annotation {entry.get('id', f'number {index}')}"


def _file_name(entry: Mapping[str, Any]) -> str | None:
    """The file name of an image with slashes; for an entry without one, the last part of its path or URL."""
    value = entry.get("file_name")
    if isinstance(value, str) and value.strip():
        name = value.replace("\\", "/")
        return _last_part(name) if "://" in name else name
    values = (entry.get(key) for key in _URL_KEYS)
    return next((_last_part(each.replace("\\", "/")) for each in values if isinstance(each, str) and each), None)


def _last_part(url: str) -> str:
    return unquote(PurePosixPath(url.partition("?")[0]).name)


def _side(value: Any) -> int:
    """A side in pixels; 0 if it is missing or not a positive integer."""
    if type(value) is int and 1 <= value <= _MAX_SIDE_PX:
        return value
    numbers = finite_numbers([value])
    usable = numbers is not None and 1 <= numbers[0] <= _MAX_SIDE_PX and numbers[0] % 1 == 0
    return int(numbers[0]) if usable and numbers is not None else 0


def _extent(segmentation: Segmentation) -> list[float]:
    """The box (x, y, width, height) around a mask: around the corners of polygons, or the pixels of run lengths."""
    if not isinstance(segmentation, list):
        return [float(value) for value in mask_api.toBbox(compressed_rle(segmentation, *segmentation["size"]))]
    points = np.concatenate(segmentation).reshape(-1, 2)
    low, high = points.min(axis=0), points.max(axis=0)
    return [*low.tolist(), *(high - low).tolist()]


def _clipped(bbox: Sequence[float], height: int, width: int) -> tuple[float, float, float, float] | None:
    """COCO's (x, y, width, height) as xyxy, clipped to the image; None if outside the image."""
    x, y, box_width, box_height = bbox
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + box_width, float(width)), min(y + box_height, float(height))
    return None if right <= left or bottom <= top else (left, top, right, bottom)


def _unused_roots(categories: Mapping[int, Mapping[str, Any]], used: set[int | None]) -> list[int]:
    """Categories without annotations that are the super-category of others, and have none themselves."""
    parents = {
        entry.get("supercategory") for entry in categories.values() if isinstance(entry.get("supercategory"), str)
    }
    roots = [
        category_id
        for category_id, entry in categories.items()
        if category_id not in used
        and entry.get("name") in parents
        and entry.get("supercategory") in (None, "", "none", "None")
    ]
    return roots if len(roots) < len(categories) else []


# --- keypoints ---------------------------------------------------------------------------------------


def read_keypoints(source: str, entries: list[dict[str, Any]]) -> CategoryKeypoints:
    """Reads the keypoints of a file's categories. A fault is returned, as boxes and masks can still be used.

    Args:
        source: annotation file, for errors.
        entries: its categories, with valid ids.
    """
    with_keypoints = [entry for entry in entries if entry.get("keypoints")]
    if not with_keypoints:
        return CategoryKeypoints()
    first = with_keypoints[0]
    try:
        names = _keypoint_names(source, first)
        for entry in with_keypoints[1:]:
            if _keypoint_names(source, entry) != names:
                raise UserError(
                    f"{source}: categories {first['id']} and {entry['id']} with different keypoints",
                    "the same keypoints in all categories that have any, as a model predicts one set of them",
                    "keep the keypoints of one category, or write one file per category",
                )
        skeleton = _skeleton(first, len(names))
    except UserError as fault:
        return CategoryKeypoints(fault=fault)
    return CategoryKeypoints(names, skeleton, frozenset(entry["id"] for entry in with_keypoints))


def _keypoint_names(source: str, entry: dict[str, Any]) -> tuple[str, ...]:
    names = entry["keypoints"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        found = f"{source}: 'keypoints' of category {entry['id']} is {str(names)[:80]}"
        raise UserError(found, "a list of unique names", _FIX)
    return tuple(names)


def _skeleton(entry: dict[str, Any], count: int) -> tuple[tuple[int, int], ...]:
    """The lines between keypoints, numbered from 1; lines that do not join two keypoints are left out."""
    lines = entry.get("skeleton")
    pairs = [tuple(line) for line in lines if isinstance(line, list)] if isinstance(lines, list) else []
    pairs = [pair for pair in pairs if len(pair) == 2 and all(type(number) is int for number in pair)]
    numbers = {number for pair in pairs for number in pair}
    first = 0 if 0 in numbers and max(numbers) < count else 1  # some tools count from 0
    known = range(first, count + first)
    return tuple((a + 1 - first, b + 1 - first) for a, b in pairs if a in known and b in known and a != b)


def checked_keypoints(value: Any, count: int) -> np.ndarray | None:
    """The keypoints of an annotation, float64 `[K, 3]`: x, y, px, and visibility; zeros where not labelled.

    Coordinates are those of the file, relative to the image's corner; as in torchvision, no half pixel is added.

    Args:
        value: `keypoints` of the annotation; None or an empty list for an object without keypoints.
        count: K, the number of keypoints of its category.

    Returns:
        None for an object without a labelled keypoint.

    Raises:
        AnnotationError: for another number of values, a value that is not finite, or an unknown visibility.
    """
    if not value:
        return None
    numbers = finite_numbers(value)
    if numbers is None:
        raise AnnotationError("malformed keypoints", "not a list of finite numbers")
    if numbers.size != 3 * count:
        raise AnnotationError("malformed keypoints", f"{numbers.size} numbers instead of 3 for each of {count}")
    keypoints = numbers.reshape(count, 3)
    unknown = keypoints[~np.isin(keypoints[:, 2], _VISIBILITIES), 2]
    if unknown.size:
        raise AnnotationError("malformed keypoints", f"visibility {unknown[0]:g} instead of 0, 1 or 2")
    labelled = keypoints[:, 2] > 0
    return keypoints * labelled[:, None] if labelled.any() else None
