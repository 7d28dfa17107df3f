"""The rules of a Dockerfile linter that matter here, and: what is copied is what an installation needs."""

import io
import json
import re

import pytest
from dockerfile_parse import DockerfileParser

NAMES = ("runtime", "tensorrt", "triton")
KNOWN = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "EXPOSE", "ENTRYPOINT", "CMD", "COMMENT"}


def faults(text: str) -> list[str]:
    """What a linter would report of a Dockerfile, by the rule of hadolint that it breaks."""
    parser = DockerfileParser(fileobj=io.BytesIO(text.encode()))
    steps = [(step["instruction"], step["value"]) for step in parser.structure]
    found = [f"unknown instruction {name}" for name, _ in steps if name not in KNOWN]
    images = [value for name, value in steps if name == "FROM"]
    found += [f"DL3006: untagged {image}" for image in images if ":" not in image or image.endswith(":latest")]
    users = [value for name, value in steps if name == "USER"]
    found += ["DL3002: runs as root"] if not users or users[-1] in ("root", "0") else []
    for name, value in steps:
        if name in ("CMD", "ENTRYPOINT") and not _is_list(value):
            found.append(f"DL3025: {name} {value}")
        if name == "WORKDIR" and not value.startswith("/"):
            found.append(f"DL3000: WORKDIR {value}")
        if name == "RUN" and re.search(r"\bcd\b|\bsudo\b", value):
            found.append(f"DL3003: {value}")
        if name == "RUN" and "pip install" in value and "--no-cache-dir" not in value:
            found.append(f"DL3042: {value}")
        if name == "RUN" and "apt-get install" in value and "rm -rf /var/lib/apt/lists" not in value:
            found.append(f"DL3009: {value}")
        for package in re.findall(r"(?<= )[A-Za-z]\S*(?= |$)", value.partition("pip install")[2].partition("&&")[0]):
            if name == "RUN" and "requirements" not in package:
                found.append(f"DL3013: {package} without a version")
    return found


def _is_list(value: str) -> bool:
    try:
        return isinstance(json.loads(value), list)
    except ValueError:
        return False


@pytest.mark.parametrize("name", NAMES)
def test_a_dockerfile_has_no_faults(name, root):
    assert faults((root / "docker" / f"{name}.Dockerfile").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", ["runtime", "tensorrt"])
def test_what_is_copied_is_what_is_installed(name, root):
    """The folders of the package, each of which the build context contains."""
    mapped = (root / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.setuptools.package-dir]")[2]
    folders = set(re.findall(r'^"maskrcnn[^"]*" = "(\w+)"$', mapped, re.MULTILINE))
    text = (root / "docker" / f"{name}.Dockerfile").read_text(encoding="utf-8")
    copied = {word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]}
    assert all((root / each).exists() for each in copied)
    assert {"maskrcnn", "export", "plugins", "runtime"} <= folders <= copied
    kept = {line[1:] for line in (root / ".dockerignore").read_text(encoding="utf-8").split() if line[0] == "!"}
    assert copied <= kept
