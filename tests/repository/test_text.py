"""The repository's text: no paths of somebody's machine."""

import re

import pytest

# A path from the top of a file system; not a part of a longer path or of an address.
PRIVATE_PATH = re.compile(r"(?<![\w.~/}-])/(?:work|root)(?![\w-])")


def private_paths(text: str) -> list[str]:
    """`line number: line` for each line that names a folder of the machine it was written on."""
    lines = enumerate(text.splitlines(), start=1)
    return [f"{number}: {line.strip()[:120]}" for number, line in lines if PRIVATE_PATH.search(line)]


@pytest.mark.parametrize("name", ["work", "root"])
def test_the_check_finds_private_paths(name):
    assert private_paths(f"fine\nsee '/{name}/main/x.py'") == [f"2: see '/{name}/main/x.py'"]
    assert private_paths(f"(/{name})") and private_paths(f"PATH=/{name}/bin") and private_paths(f"a:/{name}/b")


@pytest.mark.parametrize("text", ["a/work/b", "https://host/root/x", "$HOME/work", "/workspace/x", "/root-file"])
def test_the_check_passes_other_paths(text):
    assert not private_paths(text)


def test_no_file_names_a_folder_of_one_machine(repository_files, root):
    found = []
    for path in repository_files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture or another binary file
        found += [f"{path.relative_to(root)}:{line}" for line in private_paths(text)]
    assert not found, "\n".join(found)
