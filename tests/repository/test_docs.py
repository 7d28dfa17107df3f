"""README and docs name commands, options and files that exist."""

import re
import shlex
from pathlib import Path

import typer.main

from maskrcnn.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def command_lines(text: str) -> list[str]:
    """Every `maskrcnn …` line of code blocks and inline code, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`(maskrcnn [^`]*)`", text)
    return [line.split("#")[0].strip() for line in lines if line.strip().startswith("maskrcnn ")]


def unknown_words(line: str) -> list[str]:
    """Words of a command line that are neither commands nor options."""
    command = typer.main.get_command(app)
    words = shlex.split(line.replace("…", ""))[1:]
    while words and hasattr(command, "commands"):
        if words[0].startswith("-"):
            break
        if words[0] not in command.commands:
            return [words[0]]
        command = command.commands[words.pop(0)]
    options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    return [word for word in words if word.startswith("--") and word.split("=")[0] not in options | {"--help"}]


def test_every_command_in_the_documents_exists():
    lines = [(path.name, line) for path in DOCUMENTS for line in command_lines(path.read_text())]
    assert len(lines) > 8
    assert [(name, line) for name, line in lines if unknown_words(line)] == []


def test_the_check_finds_unknown_words():
    assert unknown_words("maskrcnn fly") == ["fly"]
    assert unknown_words("maskrcnn train --wings 2 --epochs 3") == ["--wings"]
    assert unknown_words("maskrcnn data shapes out --size 64") == []


def test_links_exist():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"
