"""Which image goes into which split: by lists, by shares drawn with a seed, or as the dataset has it."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from maskrcnn.data.convert.documents import BadEntry, Faults, read_json, read_lines
from maskrcnn.data.convert.source import Entry
from maskrcnn.errors import UserError

_DEFAULT_VAL = 0.1  # of a dataset that has no splits, so that there is something to validate on
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """The splits to make.

    Without lists and shares, images stay in the dataset's own splits; where it has none, a tenth becomes `val` and
    the rest `train`.
    """

    lists: dict[str, Path]  # split -> file of image names or ids
    shares: dict[str, float]  # split -> share of the images that no list has
    rest: str | None = None  # split of all others; by default their own, and none where they have none
    seed: int = 0

    def assigned(self, entries: Sequence[Entry], faults: Faults, *, has_splits: bool) -> list[str | None]:
        """The split of each entry; None, which is counted, for those in none.

        Raises:
            UserError: for a list that cannot be read, names an image twice or one of another list's, and where a
                share or the rest is empty.
            BadEntry: for a list's line that is no image of the dataset, unless faults are counted.
        """
        plan = self
        if not (self.lists or self.shares or self.rest or has_splits):
            plan = SplitPlan(lists={}, shares={"val": _DEFAULT_VAL}, rest="train", seed=self.seed)
        splits = plan._listed(entries, faults)
        plan._drawn(entries, splits)
        for place, entry in enumerate(entries):
            splits[place] = splits[place] or plan.rest or entry.split
            if splits[place] is None:
                faults.leave_out("image that no split list has", entry.name)
        return splits

    def _listed(self, entries: Sequence[Entry], faults: Faults) -> list[str | None]:
        splits: list[str | None] = [None] * len(entries)
        origins: dict[int, str] = {}
        places = _places_by_key(entries) if self.lists else {}
        for split, path in self.lists.items():
            for where, key in _keys_of(path):
                try:
                    place = _only_place(places, key, where)
                except BadEntry as fault:
                    faults.meet(fault)
                    continue
                if place in origins:
                    came = f"{where}: {key}, which {origins[place]} has too"
                    raise UserError(came, "each image in one list, once", "correct the lists")
                splits[place], origins[place] = split, where
        return splits

    def _drawn(self, entries: Sequence[Entry], splits: list[str | None]) -> None:
        """Fills in the shares.

        The images with the lowest hashes of seed and name are taken, so neither the order of the files nor the rest
        of the dataset decides where an image goes, but for those at the border.
        """
        free = [place for place, split in enumerate(splits) if split is None]
        free.sort(key=lambda place: hashlib.sha256(f"{self.seed}:{entries[place].name}".encode()).digest())
        begin = 0
        total = len(free)
        for split, share in self.shares.items():
            count = max(1, round(share * total))
            if begin + count + bool(self.rest) > total:
                came = f"{total} image(s) to draw {', '.join(self.shares)} from"
                raise UserError(came, "at least one image for each split", "lower the shares, or add images")
            for place in free[begin : begin + count]:
                splits[place] = split
            begin += count


def split_plan(
    texts: Sequence[str], *, rest: str | None = None, val_fraction: float | None = None, seed: int = 0
) -> SplitPlan:
    """A plan from options.

    Args:
        texts: `NAME=LIST.txt`, `NAME=LIST.json` or `NAME=SHARE` each.
        rest: name of the split of all other images.
        val_fraction: short for `val=FRACTION` with the rest `train`.
        seed: of the shares.

    Raises:
        UserError: for a text or name that cannot be, a split named twice, shares that are not between 0 and 1.
    """
    lists: dict[str, Path] = {}
    shares: dict[str, float] = {}
    if val_fraction is not None:
        texts, rest = [*texts, f"val={val_fraction}"], rest or "train"
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not value or name in lists or name in shares or not _NAME.fullmatch(name) or name == rest:
            came = f"--split {text}" + (f" with --rest {rest}" if rest else "")
            raise UserError(came, "NAME=LIST.txt or NAME=SHARE, each name once", "write for example --split val=0.1")
        share = _number(value)
        if share is None:
            lists[name] = Path(value)
        else:
            shares[name] = share
    if rest is not None and not _NAME.fullmatch(rest):
        raise UserError(f"--rest {rest}", "letters, digits, - and _", "name a split")
    if any(not 0 < share < 1 for share in shares.values()) or sum(shares.values()) > 1:
        came = ", ".join(f"{name}={share:g}" for name, share in shares.items())
        raise UserError(f"shares {came}", "each more than 0 and less than 1, at most 1 together", "correct the shares")
    return SplitPlan(lists=lists, shares=shares, rest=rest, seed=seed)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _keys_of(path: Path) -> list[tuple[str, str]]:
    """The images that a list names, each with its place: lines of text, a JSON list, or COCO JSON's image ids."""
    if path.suffix.lower() != ".json":
        return [(f"{path}, line {number}", line.split()[0]) for number, line in read_lines(path)]
    content = read_json(path)
    values = content
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        values = [image.get("id") if isinstance(image, dict) else None for image in content["images"]]
    if not isinstance(values, list) or not all(type(value) in (int, str) for value in values):
        came = f"{path}: {json.dumps(content)[:60]} …"
        raise UserError(came, "a list of names or ids, or COCO JSON with images", "correct the file")
    return [(f"{path}, entry {index}", str(value)) for index, value in enumerate(values)]


def _places_by_key(entries: Sequence[Entry]) -> dict[str, set[int]]:
    """Where the images are that a list may call by path, file name, file name without suffix, or id."""
    places: dict[str, set[int]] = defaultdict(set)
    for place, entry in enumerate(entries):
        path = PurePosixPath(entry.name)
        keys = {entry.name, str(path.with_suffix("")), path.name, path.stem}
        if entry.image_id is not None:
            keys.add(str(entry.image_id))
        for key in keys:
            places[key].add(place)
    return places


def _only_place(places: dict[str, set[int]], key: str, where: str) -> int:
    found = places.get(key, set())
    if len(found) == 1:
        return next(iter(found))
    came = f"{where}: {key}" + (f", which {len(found)} images are called" if found else "")
    expected = "the path, file name or id of one image of the dataset"
    raise BadEntry("line of a split list that is no image", came, expected, "correct the list")
