"""Layouts of datasets: which annotation file belongs to which split, and where its images are.

Recognised layouts are COCO's (`annotations/instances_<split>.json` next to `<split>/` or `images/`, also as exported by
CVAT and Datumaro), annotation files next to their images (Roboflow, Label Studio, FiftyOne, or a single JSON file and
an image folder), and YOLO's text files. A dataset can also be given by its annotation file.

A dataset without a validation split is divided: `maskrcnn.data.coco` makes the parts `name[train]` and `name[val]` of a
split.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote

import yaml

from maskrcnn.data.annotations import looks_like
from maskrcnn.data.images import IMAGE_SUFFIXES, upright_size
from maskrcnn.errors import UserError
from maskrcnn.files import files_below, read_json

LAYOUT = "a folder in COCO layout: annotations/instances_<split>.json next to <split>/"
LAYOUTS = f"""{LAYOUT}; or one annotation file in
            COCO's format and a folder of images (Roboflow, CVAT, Label Studio, FiftyOne); or YOLO's data.yaml with
            images/ and labels/"""

_PREFIX = "instances_"  # prefix of annotation files
_KEYPOINTS_PREFIX = "person_keypoints_"  # prefix of COCO's keypoint annotation files; part of the split's name
_SPLIT_WORD = re.compile(r"(?:^|[^a-z])((?:train|val|test|dev|eval)[a-z]*\d*)(?![a-z])", re.IGNORECASE)
_PLAIN_NAMES = ("_annotations.coco", "_annotations", "annotations", "annotation", "instances", "coco", "labels")
_IMAGE_FOLDERS = ("images", "Images", "data", "JPEGImages", "imgs", "img", "image")
_DEPTH = 3  # levels of subfolders in which annotation files are searched for
_MAX_FILES = 200  # maximum number of JSON files to inspect
_HEAD = 1 << 16  # bytes at either end of a JSON file from which its format is recognised
_SAMPLE = 50  # number of image names from which the image folder is chosen
_ANNOTATION_FOLDERS = {"annotations", "annotation", "labels"}  # next to image folders, in the dataset's folder
_NAME_BOTH = "give the annotation file and the folder of its images: --annotations FILE --images DIR"
_ARCHIVES = (".zip", ".gz", ".tgz", ".tar", ".7z", ".rar", ".xz", ".bz2")
_UPLOADED = re.compile(r"^[0-9a-f]{8}-(?=.)")  # prefix that Label Studio adds to the names of uploaded files
_PARTS = ("train", "val")
_PART = re.compile(r"(.+)\[(train|val)\]")  # the name of a part of a split


@dataclass(frozen=True)
class Split:
    """One split of a dataset."""

    name: str
    annotations: Path  # the annotation file; for YOLO, the YAML file or the folder
    content: Callable[[], Any] | None  # reads the annotations in COCO's structure; None: they are JSON in COCO's format
    image_folders: tuple[Path, ...]  # folders that may contain its images, the most likely first
    part: str = ""  # "train" or "val": a part of an annotation file, by name `file[part]`


def splits_of(data: str | Path, images: str | Path | None = None) -> dict[str, Split]:
    """The splits of a dataset by name.

    Args:
        data: folder of the dataset, or its annotation file (JSON in COCO's format, or YOLO's YAML).
        images: folder of the images (default: searched for near the annotation file).

    Raises:
        UserError: if there is no dataset; the message lists what was found.
    """
    root = Path(data)
    folders: tuple[Path, ...] = (Path(images),) if images else ()
    if images and not Path(images).is_dir():
        raise UserError(f"no folder {images}", "the folder of the images", "correct --images")
    if root.suffix.lower() in (".yaml", ".yml") and root.is_file():
        found = _yolo_splits(root)
    elif root.is_file() and root.suffix.lower() in _ARCHIVES:
        raise UserError(f"{root}: an archive", LAYOUTS, "unpack it, and give the folder")
    elif root.is_file() and root.suffix.lower() == ".xml":
        convert = "maskrcnn data convert voc DIR OUT, or datumaro:cvat DIR OUT for CVAT's"
        raise UserError(f"{root}: a file in XML", LAYOUTS, f"convert the dataset: {convert}")
    elif root.is_file():
        beside = root.parent
        is_inner = os.path.basename(os.path.abspath(beside)).lower() in _ANNOTATION_FOLDERS
        base = _parent(beside) if is_inner else beside
        found = [_json_split(root, base, folders, _split_name(root, beside))]
    elif not root.is_dir():
        raise UserError(f"{root} does not exist", LAYOUTS, "give the dataset's location: --data DIR")
    else:
        found = _coco_layout(root, folders) or _yolo_files(root) or _any_layout(root, folders)
    if not found:
        raise UserError(f"{root} is not a dataset: {_contents(root)}", LAYOUTS, _advice(root))
    splits: dict[str, Split] = {}
    for split in found:
        if split.name in splits:
            files = f"{splits[split.name].annotations} and {split.annotations}"
            raise UserError(
                f"two annotation files of the split {split.name!r}: {files}",
                "one annotation file for each split",
                "give the file itself, e.g. --data " + str(split.annotations),
            )
        splits[split.name] = split
    return splits


def list_splits(data: str | Path, images: str | Path | None = None) -> list[str]:
    """The names of all splits of a dataset, sorted."""
    return sorted(splits_of(data, images))


def find_split(data: str | Path, kind: str, images: str | Path | None = None) -> str:
    """The name of the split with this name, else of the only split whose name begins with it.

    If a dataset has a single split that is not for tests, "val" is a part of it, see `training_splits`; so is "train"
    if that split has another name.

    Args:
        data: see `splits_of`.
        kind: "train", "val" or an exact name, such as "val2017" or "person_keypoints_val2017".
        images: see `splits_of`.

    Raises:
        UserError: if no split or several match; the message lists the dataset's splits.
    """
    return _find(data, kind, splits_of(data, images))


def training_splits(
    data: str | Path,
    train: str,
    val: str,
    images: str | Path | None = None,
    *,
    val_data: str | Path | None = None,
    val_images: str | Path | None = None,
) -> tuple[str, str]:
    """The names of the splits to train on and to validate on.

    A dataset without a validation split is divided: the names are those of its parts, `name[train]` and `name[val]`, if
    the split to train on is the one of which "val" is a part. With `val_data`, nothing is divided.

    Args:
        data, images: see `splits_of`.
        train, val: see `find_split`.
        val_data, val_images: location of the validation split, if it is not in `data`.

    Raises:
        UserError: as in `find_split`.
    """
    splits = splits_of(data, images)
    if val_data is not None:
        return _only_or(train, data, splits), _only_or(val, val_data, splits_of(val_data, val_images))
    first, second = _find(data, train, splits), _find(data, val, splits)
    return (f"{first}[train]" if second == f"{first}[val]" else first), second


def get_split(data: str | Path, name: str, images: str | Path | None = None) -> Split:
    """The split with an exact name, as returned by `find_split`.

    Raises:
        UserError: if it does not exist; the message lists the dataset's splits.
    """
    splits = splits_of(data, images)
    part = _PART.fullmatch(name)
    if part and part.group(1) in splits:
        return replace(splits[part.group(1)], name=name, part=part.group(2))
    if name.startswith(_KEYPOINTS_PREFIX) and Path(data).is_dir():
        splits |= {split.name: split for split in _coco_files(Path(data), _KEYPOINTS_PREFIX, ())}
    if name not in splits:
        raise _no_split(data, name, splits)
    return splits[name]


def _find(data: str | Path, kind: str, splits: dict[str, Split]) -> str:
    part = _PART.fullmatch(kind)
    if kind in splits or (part and part.group(1) in splits):
        return kind
    if kind.startswith(_KEYPOINTS_PREFIX) and Path(data).is_dir():
        splits = {split.name: split for split in _coco_files(Path(data), _KEYPOINTS_PREFIX, ())} or splits
    matching = [name for name in splits if kind and name.lower().startswith(kind.lower())]
    if kind in splits or len(matching) == 1:
        return kind if kind in splits else matching[0]
    if matching:
        found = f"several splits for {kind!r} in {data}: {', '.join(sorted(matching))}"
        raise UserError(found, "one split", "give the exact name of one of them")
    divisible = [name for name in splits if not name.lower().startswith("test")]
    if kind in _PARTS and len(divisible) == 1 and not divisible[0].lower().startswith("val"):
        return f"{divisible[0]}[{kind}]"
    raise _no_split(data, kind, splits)


def _only_or(kind: str, data: str | Path, splits: dict[str, Split]) -> str:
    return next(iter(splits)) if len(splits) == 1 else _find(data, kind, splits)


def _no_split(data: str | Path, name: str, splits: dict[str, Split]) -> UserError:
    expected = f"one of: {', '.join(sorted(splits))}"
    return UserError(f"no split {name!r} in {data}", expected, "choose an existing split, or add its annotation file")


def find_splits(data: str | Path, names: Sequence[str], images: str | Path | None = None) -> list[str]:
    """The splits with these names or prefixes, without duplicates, see `find_split`; without names, all splits."""
    found = [find_split(data, name, images) for name in names] or list_splits(data, images)
    return list(dict.fromkeys(found))


# --- annotation files in COCO's format ---------------------------------------------------------------


def _json_split(path: Path, root: Path, folders: tuple[Path, ...], name: str) -> Split:
    return Split(name, path, None, folders or tuple(_image_folders(path, root, name)))


def _coco_layout(root: Path, folders: tuple[Path, ...]) -> list[Split]:
    """The splits of COCO's layout; those of keypoint files if there are no others."""
    return _coco_files(root, _PREFIX, folders) or _coco_files(root, _KEYPOINTS_PREFIX, folders)


def _coco_files(root: Path, prefix: str, folders: tuple[Path, ...]) -> list[Split]:
    files = sorted((root / "annotations").glob(f"{prefix}*.json"))
    kept = len(_PREFIX) if prefix == _PREFIX else 0
    return [_json_split(path, root, folders, path.stem[kept:]) for path in files]


def _any_layout(root: Path, folders: tuple[Path, ...]) -> list[Split]:
    """Annotation files anywhere near the top of the folder."""
    files = [path for path in islice(_files(root, (".json",)), _MAX_FILES) if _is_annotation_file(path)]
    return [_json_split(path, root, folders, _split_name(path, root)) for path in files]


def _files(root: Path, suffixes: tuple[str, ...], depth: int = _DEPTH) -> Iterator[Path]:
    """The files with these suffixes, at most `depth` folders below `root`, in sorted order; links are not followed."""
    for folder, names, files in os.walk(root):
        level = len(Path(folder).relative_to(root).parts)
        names[:] = sorted(name for name in names if not name.startswith(".")) if level < depth - 1 else []
        for name in sorted(files):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield Path(folder, name)


def _is_annotation_file(path: Path) -> bool:
    """Whether both ends of a file, or a small file as a whole, look like COCO's format."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            text = file.read(_HEAD)
            if size > 2 * _HEAD:
                file.seek(-_HEAD, os.SEEK_END)
            text += file.read()
    except OSError:
        return False
    keys = sum(f'"{key}"'.encode() in text for key in ("images", "annotations", "categories"))
    if keys < 2:
        return False
    if size > 2 * _HEAD:
        return True
    try:
        content = read_json(path, "JSON")
    except UserError:
        return True  # damaged: reported when it is read
    return isinstance(content, dict) and isinstance(content.get("images"), list)


def _split_name(path: Path, root: Path) -> str:
    """The split of an annotation file: the word train, val, test … in its name or its folder's name, else its name."""
    stem = path.name[: -len(path.suffix)] if path.suffix else path.name
    word = _SPLIT_WORD.search(stem)
    if word:
        return word.group(1)
    for part in reversed(path.parent.relative_to(root).parts if path.parent.is_relative_to(root) else ()):
        word = _SPLIT_WORD.search(part)
        if word:
            return part
    if stem.lower() in _PLAIN_NAMES and path.parent != root and path.parent.name.lower() not in _PLAIN_NAMES:
        return path.parent.name
    return stem.removeprefix(_PREFIX) or stem


def _parent(folder: Path) -> Path:
    """The parent folder; unlike `Path.parent`, also that of "."."""
    return Path(os.path.normpath(folder / os.pardir))


def _image_folders(path: Path, root: Path, split: str) -> Iterator[Path]:
    """Folders that may contain the images of an annotation file, the most likely first."""
    name = split.removeprefix(_KEYPOINTS_PREFIX)
    yield root / name
    near = dict.fromkeys([path.parent, root, _parent(path.parent)])
    for base in near:
        if base != _parent(root):
            yield from (base / name, base / name / "images", *(base / each / name for each in _IMAGE_FOLDERS))
            yield from (base / each for each in _IMAGE_FOLDERS)
            yield base


def _keys(file: str) -> tuple[str, ...]:
    """Keys to find the file of an image: its name, as given, in lower case, and without its suffix.

    Unicode is normalized, as macOS writes accented letters as two characters.
    """
    plain = unicodedata.normalize("NFC", file)
    return (plain, plain.lower(), f"{PurePath(plain).stem.lower()}.")


class ImageFinder:
    """Finds the files of a split's images, independent of the folder or system on which their names were written.

    Only files in the folders are found: an annotation file cannot refer to others.

    Args:
        folders: folders that may contain the images, the most likely first; (): the images are not needed.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()] or [*folders[:1], Path()][:1]
        self._is_known = bool(folders)
        self._index: dict[str, list[Path]] | None = None

    def choose(self, names: Sequence[str]) -> Path:
        """Sets and returns the folder that contains most of a sample of these images."""
        self.folder = self._folders[0]
        some = names[:: max(1, len(names) // _SAMPLE)][:_SAMPLE] if self._is_known else []
        counts = [sum(self._direct(folder, name) is not None for name in some) for folder in self._folders]
        best = counts.index(max(counts))
        self.folder = self._folders[best]
        inner = [folder for folder in self._folders if folder != Path(folder.anchor)]
        if some and counts[best] == 0 and len(inner) > 1:
            self.folder = min(inner, key=lambda folder: len(Path(os.path.abspath(folder)).parts))  # search all below
        return self.folder

    def find(self, name: str) -> Path:
        """The file of an image; if missing, the path where it was expected."""
        direct = self._direct(self.folder, name) if self._is_known else Path(name)
        if direct is not None:
            return direct
        if self._index is None:
            self._index = self._searched()  # assigned only when complete: other threads may read it
        index = self._index
        last = Path(name).name
        names = dict.fromkeys((last, unquote(last), _UPLOADED.sub("", last)))
        for key in dict.fromkeys(chain.from_iterable(map(_keys, names))):
            found = sorted(set(index.get(key, ())))
            for likely in (self.folder, *self._folders) if found else ():  # the most likely folder first
                inside = [path for path in found if likely in path.parents]
                if len(inside) == 1:
                    return inside[0]
        return self.folder / last

    def _searched(self) -> dict[str, list[Path]]:
        """The images in the folder and below, by their keys."""
        index: dict[str, list[Path]] = {}
        is_disk = self.folder == Path(self.folder.anchor)
        for folder, _, files in () if is_disk else os.walk(self.folder):
            for file in files:
                if file.lower().endswith(IMAGE_SUFFIXES):
                    for key in _keys(file):
                        index.setdefault(key, []).append(Path(folder, file))
        return index

    @staticmethod
    def _direct(folder: Path, name: str) -> Path | None:
        """The file with this name, or with its last parts, below a folder."""
        parts = [part for part in Path(os.path.normpath(name)).parts if part not in (os.sep, os.pardir)]
        if (parts and os.path.splitdrive(parts[0])[0]) or (parts and parts[0].endswith(":")):
            parts = parts[1:]
        for first in range(len(parts)):
            path = folder.joinpath(*parts[first:])
            if os.path.isfile(path):
                return path
        return None


# --- YOLO's text files -------------------------------------------------------------------------------


def _yolo_files(root: Path) -> list[Split]:
    """The splits of a folder with a YAML file of YOLO's, with Darknet's obj.data, or with images/ and labels/."""
    for path in _files(root, (".yaml", ".yml", ".data"), depth=2):
        splits = _darknet_splits(path) if path.suffix == ".data" else _yolo_splits(path, is_required=False)
        if splits:
            return splits
    if not (root / "labels").is_dir():
        return []
    names = next((_lines(root / each) for each in ("classes.txt", "obj.names") if (root / each).is_file()), None)
    folders = sorted(path.name for path in (root / "labels").iterdir() if path.is_dir()) or ["."]
    image_root = root / "images" if (root / "images").is_dir() else root
    classes = dict(enumerate(names)) if names else None
    return [
        Split(
            "all" if name == "." else name,
            root,
            partial(_yolo_content, [image_root / name], classes, {}, root),
            (root,),
        )
        for name in folders
    ]


def _yolo_splits(path: Path, *, is_required: bool = True) -> list[Split]:
    """The splits of YOLO's YAML file; none for another YAML file, unless `is_required`."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        if is_required:
            raise UserError(f"{path} is not YAML ({error})", "YOLO's data.yaml", "correct the file") from error
        return []
    keys = ("train", "val", "valid", "test")
    if not isinstance(content, dict) or "names" not in content or not any(content.get(key) for key in keys):
        if is_required:
            raise UserError(
                f"{path} has no names and paths", "YOLO's data.yaml: names, and train: or val:", "correct the file"
            )
        return []
    names = yaml.load(text, yaml.BaseLoader)["names"]  # keeps texts unchanged: `no` is a name, not False
    classes = dict(enumerate(names)) if isinstance(names, list) else names if isinstance(names, dict) else {"": ""}
    if not all(str(key).isdecimal() and isinstance(name, str) for key, name in classes.items()):
        raise UserError(f"{path}: names is {names!r}", "a list of class names, or number: name", "correct the file")
    base = path.parent / str(content.get("path") or ".")
    if not base.is_dir():
        base = path.parent
    splits = []
    for key in keys:
        value = content.get(key)
        if not value:
            continue
        sources = [_below(base, path.parent, str(each)) for each in (value if isinstance(value, list) else [value])]
        if any(source.exists() for source in sources) or key in ("train", "val"):
            splits.append(_yolo_split(key, path, sources, classes, content, base))
    return splits


def _yolo_split(
    name: str, path: Path, sources: Sequence[Path], classes: dict[Any, Any], options: dict[str, Any], base: Path
) -> Split:
    """A split of a file that refers to folders or lists of images, which may be anywhere."""
    read = partial(_yolo_content, sources, classes, options, base)
    return Split(name, path, read, (base, Path(base.absolute().anchor)))


def _darknet_splits(path: Path) -> list[Split]:
    """The splits of a Darknet file, such as CVAT's obj.data; none for another file."""
    pairs = (line.partition("=") for line in _lines(path))
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    if not fields.get("names"):
        return []
    base = path.parent
    classes = dict(enumerate(_lines(_below(base, base, fields["names"]))))
    return [
        _yolo_split(name, path, [_below(base, base, fields[key])], classes, {}, base)
        for key, name in (("train", "train"), ("valid", "val"))
        if fields.get(key)
    ]


def _below(base: Path, folder: Path, value: str) -> Path:
    """Resolves a path in YOLO's files, which may have been written on another machine.

    Roboflow writes `../train/images` for `train/images`, CVAT `data/images/train/a.jpg` for `images/train/a.jpg`, and
    others the dataset's path on their machine. For folders, the last two parts must match: `val/images` is not
    `images`.
    """
    parts = [part for part in value.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    least = 1 if len(parts) < 2 or PurePath(parts[-1]).suffix else 2
    shortened = ("/".join(parts[start:]) for start in range(max(1, len(parts) - least + 1)))
    candidates = (Path(root, name) for name in (value, *shortened) for root in (base, folder))
    return next((path for path in candidates if path.exists()), base / "/".join(parts))


def _yolo_content(sources: Sequence[Path], classes: dict[Any, Any] | None, options: dict[str, Any], base: Path) -> Any:
    """A split of YOLO's text files in COCO's structure.

    Each line is a class and, as fractions of the image, a polygon (x, y, …), a box (centre, width, height), or with
    `kpt_shape` a box and keypoints.
    """
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            files += files_below(source, IMAGE_SUFFIXES)
        elif source.is_file():
            files += [_below(source.parent, base, line) for line in _lines(source)]
        else:
            raise UserError(f"{source} does not exist", "the images given in data.yaml", "correct data.yaml")
    is_below = all(file.is_relative_to(base) for file in files)
    shape = options.get("kpt_shape")
    points = tuple(shape) if isinstance(shape, list) and len(shape) == 2 else None
    images, annotations, used = [], list[dict[str, Any]](), set()
    for image_id, file in enumerate(files, start=1):
        size_hw = upright_size(file)
        name = file.relative_to(base).as_posix() if is_below else file.absolute().as_posix()
        entry: dict[str, Any] = {"id": image_id, "file_name": name}
        if size_hw is not None:
            entry |= {"height": size_hw[0], "width": size_hw[1]}
        images.append(entry)
        for line in _lines(_label_file(file)):
            annotation = _yolo_annotation(line.split(), size_hw or (1, 1), points)
            used.add(annotation["category_id"])
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    if classes is None:
        classes = {key: f"class {key}" for key in sorted(key for key in used if isinstance(key, int))}
    categories: list[dict[str, Any]] = [{"id": int(key), "name": str(name)} for key, name in classes.items()]
    if points is not None:
        named = _keypoint_names(int(points[0]), options)
        categories = [{**category, "keypoints": named} for category in categories]
    return {"images": images, "annotations": annotations, "categories": categories}


def _keypoint_names(count: int, options: dict[str, Any]) -> list[str]:
    """Names from which mirrored pairs are recognised: the file's, else generated from its `flip_idx`."""
    names = options.get("kpt_names")
    if isinstance(names, dict):
        names = next(iter(names.values()), None)
    if isinstance(names, list) and len(names) == count:
        return [str(name) for name in names]
    partners = options.get("flip_idx")
    if not isinstance(partners, list) or len(partners) != count:
        partners = list(range(count))
    sides = ["" if a == b else "left_" if a < b else "right_" for a, b in enumerate(partners)]
    return [f"{side}{min(a, b) + 1}" for a, (b, side) in enumerate(zip(partners, sides, strict=True))]


def _label_file(image: Path) -> Path:
    """The text file of an image: in `labels` instead of the last `images`, else next to the image."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        index = len(parts) - 1 - parts[::-1].index("images")
        parts[index] = "labels"
        swapped = Path(*parts).with_suffix(".txt")
        if swapped.is_file():
            return swapped
    beside = image.parent.parent / "labels" / image.with_suffix(".txt").name
    return beside if beside.is_file() else image.with_suffix(".txt")


def _yolo_annotation(fields: list[str], size_hw: tuple[int, int], points: tuple[Any, ...] | None) -> dict[str, Any]:
    """COCO's fields of a line; a malformed line has no box and is counted by the reader."""
    try:
        category, values = int(float(fields[0])), [float(each) for each in fields[1:]]
    except (ValueError, OverflowError):
        return {"category_id": fields[0], "bbox": " ".join(fields)}
    height, width = size_hw
    scaled = [value * (width, height)[index % 2] for index, value in enumerate(values)]
    number, dims = (int(points[0]), int(points[1])) if points is not None else (0, 0)
    if len(values) == 4 or (points is not None and len(values) == 4 + number * dims):
        x, y, w, h = scaled[:4]
        annotation: dict[str, Any] = {"category_id": category, "bbox": [x - w / 2, y - h / 2, w, h], "area": w * h}
        if len(values) > 4:
            rows = [values[4 + k * dims : 4 + (k + 1) * dims] for k in range(number)]
            annotation["keypoints"] = [
                each
                for row in rows
                for each in (row[0] * width, row[1] * height, row[2] if dims > 2 else 2 * bool(row[0] or row[1]))
            ]
        return annotation
    if len(values) >= 6 and len(values) % 2 == 0:
        xs, ys = scaled[0::2], scaled[1::2]
        corners = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
        area = abs(sum(x0 * y1 - x1 * y0 for x0, y0, x1, y1 in corners)) / 2  # shoelace formula
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        return {"category_id": category, "bbox": box, "area": area, "segmentation": [scaled]}
    return {"category_id": category, "bbox": values}


def _lines(path: Path) -> list[str]:
    """The non-blank lines of a text file; none if it is missing."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]


# --- what is there instead ---------------------------------------------------------------------------


def _contents(root: Path) -> str:
    """A short description of a folder's content."""
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        return str(error)
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries]
    return f"it holds {', '.join(names[:12])}{' …' if len(names) > 12 else ''}" if names else "it is empty"


def _advice(root: Path) -> str:
    """The next step for a folder without a recognised layout."""
    nearest = next((each for each in (root, *_folders(root)) if (each / "Annotations").is_dir()), None)
    if nearest is not None and any((nearest / "Annotations").rglob("*.xml")):
        return f"convert it (Pascal VOC): maskrcnn data convert voc {nearest} OUT"
    if (root / "gtFine").is_dir():
        return f"convert it (Cityscapes): maskrcnn data convert cityscapes {root} OUT"
    if (root / "PNGImages").is_dir():
        return f"convert it (Penn-Fudan): maskrcnn data convert penn-fudan {root} OUT"
    for path in islice(_files(root, (".json",)), 3):
        try:
            content = read_json(path, "JSON")
        except UserError:
            continue
        if isinstance(content, dict) and "shapes" in content:
            return f"convert it (LabelMe): maskrcnn data convert labelme {root} OUT"
        if isinstance(content, dict) and ("_via_img_metadata" in content or "regions" in str(content)[:2000]):
            return f"convert it (VGG Image Annotator): maskrcnn data convert via {path} OUT"
        return f"{path} is not in COCO's format{looks_like(content)}; {_NAME_BOTH}"
    if (root / "annotations.xml").is_file():
        return f"export as COCO in CVAT, or convert it: maskrcnn data convert datumaro:cvat {root} OUT"
    if (root / "masks").is_dir():
        return f"convert it (masks as images): maskrcnn data convert id-masks {root} OUT"
    return f"{_NAME_BOTH}; or see maskrcnn data convert --help"


def _folders(root: Path) -> list[Path]:
    return [path for path in sorted(root.iterdir()) if path.is_dir()]
