"""The repository's text: no paths of somebody's machine."""

import re

# A path from the top of a file system; not a part of a longer path or of an address.
PRIVATE_PATH = re.compile(r"(?<![\w.~/}-])/(?:work|root)(?![\w-])")


def private_paths(text: str) -> list[str]:
    """`line number: line` for each line that names a folder of the machine it was written on."""
    lines = enumerate(text.splitlines(), start=1)
    return [f"{number}: {line.strip()[:120]}" for number, line in lines if PRIVATE_PATH.search(line)]


def test_no_file_names_a_folder_of_one_machine(repository_files, root):
    found = []
    for path in repository_files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture or another binary file
        found += [f"{path.relative_to(root)}:{line}" for line in private_paths(text)]
    assert not found, "\n".join(found)
