"""Class names and their category ids.

A file of classes has one class on each line: `name`, or `id: name`, followed by synonyms of the class, separated by
commas (`person, man, woman`). A file of aliases has such lines without ids. Two names with one id, a name on two lines,
and names that differ only in case or spaces are errors, because training would not notice them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from maskrcnn.data.convert.files import read_lines
from maskrcnn.data.convert.source import BadEntry, Category, Faults, Options
from maskrcnn.errors import UserError

_WITH_ID = re.compile(r"(\d+)\s*:\s*(.*)")


def normalized(name: str) -> str:
    """The name in lower case with single spaces, which is used to compare classes."""
    return " ".join(name.split()).casefold()


class Vocabulary:
    """The classes of a dataset.

    Args:
        categories: classes with unique names and ids.
        aliases: synonym -> class name.
        is_closed: leave out objects of other classes, instead of reporting a fault.
        origin: name of the source of the classes in errors.

    Raises:
        UserError: for duplicate names or ids.
    """

    def __init__(
        self,
        categories: Sequence[Category],
        aliases: dict[str, str] | None = None,
        *,
        is_closed: bool = False,
        origin: str = "the classes",
    ) -> None:
        check_categories(categories, origin)
        self.categories = tuple(sorted(categories, key=lambda category: category.id))
        self.aliases = {normalized(alias): normalized(name) for alias, name in (aliases or {}).items()}
        self.is_closed = is_closed
        self._ids = {normalized(category.name): category.id for category in categories}

    def __contains__(self, category_id: int) -> bool:
        return any(category.id == category_id for category in self.categories)

    def id_of(self, name: str, where: str, faults: Faults) -> int | None:
        """The category id of a class name; None, and counted in `faults`, for an unknown name if `is_closed`.

        Raises:
            BadEntry: for an unknown name otherwise; `where` identifies the object.
        """
        key = normalized(name)
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
            "correct the label, or list all classes with --classes FILE or --alias FILE",
        )


def check_categories(categories: Iterable[Category], origin: str) -> None:
    """Raises a UserError for two categories with the same id, or with names that differ only in case and spaces."""
    ids: dict[int, str] = {}
    names: dict[str, Category] = {}
    for category in categories:
        if category.id in ids:
            found = f"{origin}: {ids[category.id]!r} and {category.name!r} both have id {category.id}"
            raise UserError(found, "unique class ids", "correct the classes")
        first = names.get(normalized(category.name))
        if first is not None:
            found = f"{origin}: {first.name!r} (id {first.id}) and {category.name!r} (id {category.id}) are one name"
            raise UserError(found, "names that differ in more than case and spaces", "correct the classes")
        ids[category.id], names[normalized(category.name)] = category.name, category


def build_vocabulary(options: Options, faults: Faults, names: Iterable[tuple[str, str]]) -> Vocabulary:
    """The vocabulary from `options.classes`, else from the class names in a dataset, with synonyms of `options.alias`.

    Args:
        options: see `Options`.
        faults: counts faults of the file of aliases.
        names: class names, each with its place; iterated only without `options.classes`.

    Raises:
        UserError: for files that cannot be read or whose names clash, and names that differ only in case or spaces.
    """
    aliases = read_aliases(options.alias, faults) if options.alias else {}
    if options.classes:
        categories, synonyms = read_classes(Path(options.classes))
        return Vocabulary(categories, aliases | synonyms, origin=options.classes)
    return vocabulary_from_names(names, aliases)


def vocabulary_from_names(names: Iterable[tuple[str, str]], aliases: dict[str, str]) -> Vocabulary:
    """The class names of a dataset, sorted and numbered from 1.

    Args:
        names: class names, each with its place.
        aliases: normalized synonym -> class name.

    Raises:
        UserError: if two names differ only in case or spaces; the message has both places.
    """
    classes: dict[str, tuple[str, str]] = {}
    for given, where in names:
        name = aliases.get(normalized(given), " ".join(given.split()))
        first = classes.setdefault(normalized(name), (name, where))
        if first[0] != name:
            found = f"{first[1]}: class {first[0]!r}; {where}: class {name!r}"
            raise UserError(found, "one spelling of each class", "correct the labels, or add an --alias file")
    ordered = sorted(name for name, _ in classes.values())
    return Vocabulary([Category(k, name) for k, name in enumerate(ordered, start=1)], aliases)


def read_classes(path: Path) -> tuple[list[Category], dict[str, str]]:
    """Reads a file of classes: the categories, numbered from 1 where lines have no id, and normalized synonym -> name.

    Raises:
        UserError: if the file cannot be read, has no class, ids on some lines only, or names that clash.
    """
    categories: list[Category] = []
    aliases: dict[str, str] = {}
    lines = list(read_lines(path))
    matches = [_WITH_ID.fullmatch(line) for _, line in lines]
    if len({match is None for match in matches}) != 1:
        found = f"{path}: " + ("ids on some lines only" if lines else "no class")
        raise UserError(found, "one class on each line, all as `name` or all as `id: name`", "correct the file")
    for index, ((number, line), match) in enumerate(zip(lines, matches, strict=True), start=1):
        name, *synonyms = _names(match[2] if match else line, path, number)
        categories.append(Category(int(match[1]) if match else index, name))
        aliases |= _new_aliases(aliases, synonyms, name, f"{path}, line {number}")
    check_categories(categories, str(path))
    if any(category.id < 1 for category in categories):
        raise UserError(f"{path}: id 0", "ids from 1; 0 is background", "correct the file")
    for category in categories:
        target = aliases.get(normalized(category.name), category.name)
        if target != category.name:
            found = f"{path}: {category.name!r} is a class and a synonym of {target!r}"
            raise UserError(found, "each name on one line", "correct the file")
    return categories, aliases


def read_aliases(path: Path, faults: Faults) -> dict[str, str]:
    """Reads a file of aliases: each normalized name -> the first name of its line.

    A name that occurs on an earlier line is a fault; with `keep_going`, the earlier line is used.

    Raises:
        UserError: if the file cannot be read.
        BadEntry: for a name on two lines, unless faults are counted.
    """
    aliases: dict[str, str] = {}
    for number, line in read_lines(path):
        names = _names(line, path, number)
        for name in names:
            try:
                aliases |= _new_aliases(aliases, [name], names[0], f"{path}, line {number}")
            except BadEntry as fault:
                faults.handle(fault)
    return aliases


def _names(line: str, path: Path, number: int) -> list[str]:
    names = [" ".join(name.split()) for name in line.split(",")]
    if not all(names):
        raise UserError(f"{path}, line {number}: {line!r}", "names separated by commas", "correct the file")
    return names


def _new_aliases(known: dict[str, str], names: Sequence[str], target: str, where: str) -> dict[str, str]:
    for name in names:
        earlier = known.get(normalized(name), target)
        if earlier != target:
            found = f"{where}: {name!r} stands for {target!r}, and for {earlier!r} on an earlier line"
            raise BadEntry("name that stands for two classes", found, "each name on one line", "correct the file")
    return {normalized(name): target for name in names}
