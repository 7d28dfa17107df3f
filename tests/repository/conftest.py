"""Where the repository is and which files belong to it."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder that holds pyproject.toml."""
    assert (ROOT / "pyproject.toml").is_file()
    return ROOT


# What a build, a test run or a demo leaves behind; .gitignore names the same.
_MADE = {"__pycache__", "build", "demo", "dist", "runs", "predictions"}


@pytest.fixture(scope="session")
def repository_files(root) -> list[Path]:
    """Every file that is committed, or would be with the next commit of everything."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return sorted(path for path in root.rglob("*") if path.is_file() and not _is_made(path.relative_to(root)))
    return [root / name for name in listing.split("\0") if name and (root / name).is_file()]


def _is_made(path: Path) -> bool:
    hidden = any(part.startswith(".") and part not in (".ci", ".gitignore") for part in path.parts)
    return hidden or any(part in _MADE or part.endswith(".egg-info") for part in path.parts)
