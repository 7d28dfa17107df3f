"""README and docs: every command line parses, every link leads somewhere, and figures are those of the results."""

import re
import shlex
from pathlib import Path

import click
import pytest
import run
import typer.main

from maskrcnn.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str) -> list[str]:
    """Every command line of the shell blocks, without comments and prompts; continued lines are joined."""
    found = re.findall(r"^ *```(?:sh|bash)\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in found for line in block.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines for part in re.sub(r"(^|\s)#.*", "", line).split(" && ") if part.strip()]


def inline(text: str) -> list[str]:
    """Every `maskrcnn …` of the running text."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [" ".join(line.split()) for line in re.findall(r"`(maskrcnn [^`]*)`", text)]


def fault(line: str) -> str:
    """Why a command line of a block does not parse, by the parser of its program; "" if it does."""
    words = shlex.split(line.replace("…", ""))
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    if words[0] == "make":
        targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return "" if set(words[1:]) <= {*targets, ".venv"} else f"targets are {targets}"
    if words[0] == "docker" and "-f" in words:
        return "" if (ROOT / words[words.index("-f") + 1]).is_file() else "no such file"
    if words[0].endswith("python") and words[1].endswith(".py") and not (ROOT / words[1]).is_file():
        return "no such program"
    if words[:2] in (["python", "benchmarks/run.py"], ["maskrcnn", "benchmark"]):
        try:
            run.parse(words[2:])
        except SystemExit:
            return "not an option of benchmarks/run.py"
    elif words[0] == "maskrcnn":
        return _parsed(typer.main.get_command(app), words)
    return ""


def _parsed(command: click.Command, words: list[str]) -> str:
    """The message of the command's parser: unknown options, missing arguments, values of a wrong type."""
    parent = None
    name, *words = words
    try:
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            parent = command.make_context(name, [words[0]], parent=parent, resilient_parsing=True)
            name, *words = words
            if name not in command.commands:
                return f"no command {name}"
            command = command.commands[name]
        with command.make_context(name, words, parent=parent):
            return ""
    except Exception as error:  # click's, which typer may bring with it
        if not hasattr(error, "format_message"):
            raise
        return error.format_message()


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


def test_every_command_line_parses():
    lines = [(path.name, line) for path in DOCUMENTS for line in blocks(path.read_text(encoding="utf-8"))]
    assert len(lines) > 100
    assert [(*line, reason) for line in lines if (reason := fault(line[1]))] == []


def test_commands_in_the_text_exist():
    lines = [(path.name, line) for path in DOCUMENTS for line in inline(path.read_text(encoding="utf-8"))]
    assert len(lines) > 50
    assert [(name, line) for name, line in lines if unknown_words(line)] == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("maskrcnn fly", "no command fly"),
        ("maskrcnn train --wings 2", "--wings"),
        ("torchrun --nproc-per-node 2 -m maskrcnn train --epochs many", "--epochs"),
        ("maskrcnn data shapes", "(?i)missing argument"),
        ("python benchmarks/run.py --wings", "not an option"),
        ("maskrcnn benchmark --wings", "not an option"),
        ("python benchmarks/fly.py", "no such program"),
        ("make fly", "targets are"),
        ("docker build -f docker/fly.Dockerfile .", "no such file"),
    ],
)
def test_the_check_finds_faults(line, reason):
    assert re.search(reason, fault(line))


def test_the_check_passes_what_is_right():
    assert blocks("```sh\na \\\n  b  # c\nx && y\n```") == ["a    b", "x", "y"]
    for line in ("maskrcnn train --epochs 3 --set a.b=2", "maskrcnn data shapes out --val-images 3", "make test", "ls"):
        assert fault(line) == ""
    assert unknown_words("maskrcnn fly") == ["fly"] and unknown_words("maskrcnn train --wings 2") == ["--wings"]


def test_links_exist():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_figures_of_the_readme_are_those_of_their_pages():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| \[[^\]]*\]\(([^)#]+)[^|]* \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for title, value, page in rows:
        text = (ROOT / page).read_text(encoding="utf-8")
        for number in re.findall(r"\d+(?:\.\d+)?", f"{title} {value}".replace("8-bit", "").replace("ResNet-50", "")):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", text), f"{number} of {title!r} is not in {page}"
