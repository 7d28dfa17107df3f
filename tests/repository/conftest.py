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


@pytest.fixture(scope="session")
def repository_files(root) -> list[Path]:
    """Every file that is committed, or would be with the next commit of everything."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if listing.returncode != 0:
        pytest.skip(f"not a git checkout: {listing.stderr.strip()}")
    return [root / name for name in listing.stdout.split("\0") if name and (root / name).is_file()]
