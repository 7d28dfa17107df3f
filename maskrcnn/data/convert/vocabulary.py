"""Names of classes and the category ids they get.

A file of classes has one on each line: `name`, or `id: name`, and after commas further names of the same class
(`person, man, woman`). A file of aliases has such lines without ids. Two names for one id, one name on two lines,
and names that differ only in case or spaces are refused: such maps are mistakes, and training would not notice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskrcnn.data.convert.documents import BadEntry, Faults, read_lines
from maskrcnn.errors import UserError

_WITH_ID = re.compile(r"(\d+)\s*:\s*(.*)")


@dataclass(frozen=True)
class Category:
    """A class as the annotation file lists it."""

    id: int  # positive
    name: str
    fields: dict[str, Any] = field(default_factory=dict)  # what else the source says of it


def plain(name: str) -> str:
    """What names of one class have in common: case and spaces do not count."""
    return " ".join(name.split()).casefold()


class Vocabulary:
    """The classes of a dataset.

    Args:
        categories: each with a name and id of its own.
        aliases: further names, each with the name it stands for.
        is_closed: whether other names are left out, and not a fault.

    Raises:
        UserError: where categories clash.
    """

    def __init__(
        self,
        categories: Sequence[Category],
        aliases: dict[str, str] | None = None,
        *,
        is_closed: bool = False,
        origin: str = "the classes",
    ) -> None:
        refuse_clashes(categories, origin)
        self.categories = tuple(sorted(categories, key=lambda category: category.id))
        self.aliases = {plain(alias): plain(name) for alias, name in (aliases or {}).items()}
        self.is_closed = is_closed
        self._ids = {plain(category.name): category.id for category in categories}

    def __contains__(self, category_id: int) -> bool:
        return any(category.id == category_id for category in self.categories)

    def id_of(self, name: str, where: str, faults: Faults) -> int | None:
        """The category id of a name; None, which is counted, for one that a closed vocabulary does not have.

        Raises:
            BadEntry: for an unknown name, and an open vocabulary.
        """
        key = plain(name)
        category_id = self._ids.get(self.aliases.get(key, key))
        if category_id is not None:
            return category_id
        if self.is_closed:
            faults.leave_out("class that is not in the vocabulary", f"{where}: {name!r}")
            return None
        known = ", ".join(category.name for category in self.categories[:9])
        raise BadEntry(
            "unknown class",
            f"{where}: class {name!r}",
            f"one of {known}" + (" …" if len(self.categories) > 9 else ""),
            "correct the label, or name all classes with --classes FILE or --alias FILE",
        )


def refuse_clashes(categories: Iterable[Category], origin: str) -> None:
    """Raises a UserError where two categories have one id, one name, or names that differ in case or spaces alone."""
    ids: dict[int, str] = {}
    names: dict[str, Category] = {}
    for category in categories:
        if category.id in ids:
            came = f"{origin}: {ids[category.id]!r} and {category.name!r} both have id {category.id}"
            raise UserError(came, "an id of its own for each class", "correct the classes")
        twin = names.get(plain(category.name))
        if twin is not None:
            came = f"{origin}: {twin.name!r} (id {twin.id}) and {category.name!r} (id {category.id}) are one name"
            raise UserError(came, "names that differ in more than case and spaces", "correct the classes")
        ids[category.id], names[plain(category.name)] = category.name, category


def read_classes(path: Path) -> tuple[list[Category], dict[str, str]]:
    """The classes of a file, numbered from 1 where lines have no id, and their further names.

    Raises:
        UserError: where the file cannot be read, has no class, ids on some lines only, or names that clash.
    """
    categories: list[Category] = []
    aliases: dict[str, str] = {}
    lines = list(read_lines(path))
    with_ids = {bool(_WITH_ID.fullmatch(line)) for _, line in lines}
    if len(with_ids) != 1:
        came = f"{path}: " + ("ids on some lines only" if lines else "no class")
        raise UserError(came, "one class on each line, all as `name` or all as `id: name`", "correct the file")
    for index, (number, line) in enumerate(lines, start=1):
        match = _WITH_ID.fullmatch(line)
        name, *others = _names_of(match.group(2) if match else line, path, number)
        categories.append(Category(int(match.group(1)) if match else index, name))
        aliases |= _new_aliases(aliases, others, name, f"{path}, line {number}")
    origin = str(path)
    refuse_clashes(categories, origin)
    if any(category.id < 1 for category in categories):
        raise UserError(f"{path}: id 0", "ids from 1; 0 is background", "correct the file")
    for category in categories:
        if aliases.get(plain(category.name), category.name) != category.name:
            came = f"{path}: {category.name!r} is a class and another name of {aliases[plain(category.name)]!r}"
            raise UserError(came, "each name on one line", "correct the file")
    return categories, aliases


def read_aliases(path: Path, faults: Faults) -> dict[str, str]:
    """Each further name (see `plain`) of a file of aliases, with the first name of its line.

    A line of which a name stands on an earlier line is a fault; going on, the earlier line counts for that name.

    Raises:
        UserError: where the file cannot be read.
        BadEntry: for a name on two lines, unless faults are counted.
    """
    aliases: dict[str, str] = {}
    for number, line in read_lines(path):
        first, *others = _names_of(line, path, number)
        for name in (first, *others):
            try:
                aliases |= _new_aliases(aliases, [name], first, f"{path}, line {number}")
            except BadEntry as fault:
                faults.meet(fault)
    return aliases


def _names_of(line: str, path: Path, number: int) -> list[str]:
    names = [" ".join(name.split()) for name in line.split(",")]
    if not all(names):
        raise UserError(f"{path}, line {number}: {line!r}", "names with commas between", "correct the file")
    return names


def _new_aliases(known: dict[str, str], names: Sequence[str], first: str, where: str) -> dict[str, str]:
    for name in names:
        if known.get(plain(name), first) != first:
            came = f"{where}: {name!r} stands for {first!r}, and for {known[plain(name)]!r} on an earlier line"
            raise BadEntry("name that stands for two classes", came, "each name on one line", "correct the file")
    return {plain(name): first for name in names}


def collected(names: Iterable[tuple[str, str]], aliases: dict[str, str]) -> Vocabulary:
    """A vocabulary of the names that a dataset uses, sorted and numbered from 1.

    Args:
        names: each with the place where it is used.
        aliases: further names, which get no number.

    Raises:
        UserError: where two names differ in case or spaces only, with both places.
    """
    found: dict[str, tuple[str, str]] = {}
    for given, where in names:
        name = aliases.get(plain(given), " ".join(given.split()))
        first = found.setdefault(plain(name), (name, where))
        if first[0] != name:
            came = f"{first[1]}: class {first[0]!r}; {where}: class {name!r}"
            raise UserError(came, "one spelling of each class", "correct the labels, or give an --alias file")
    ordered = sorted(name for name, _ in found.values())
    return Vocabulary([Category(k, name) for k, name in enumerate(ordered, start=1)], aliases)
