"""What is installed is what lies in the folders, under the package's own name and nowhere else."""

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import maskrcnn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it on Python 3.10

# What a wheel must carry besides Python: the sources that are compiled where the package is used.
COMPILED_LATER = {".cu", ".cuh", ".cpp", ".cc", ".c", ".h", ".hpp", ".inl", ".cmake"}
NOT_AT_THE_TOP = ("export", "plugins", "runtime", "tests", "benchmarks", "configs", "docs")


def settings(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def packages_on_disk(root: Path, package_dir: dict[str, str]) -> set[str]:
    """The packages that the folders named in `package-dir` hold: each folder with a Python file in it."""
    found = set()
    for package, folder in package_dir.items():
        for path in (root / folder).rglob("*.py"):
            inner = path.parent.relative_to(root / folder).parts
            found.add(".".join([package, *inner]))
    return found


def files_wanted(root: Path, package_dir: dict[str, str]) -> set[str]:
    """The names in the wheel of everything that has to be installed."""
    return {
        (Path(package.replace(".", "/")) / path.relative_to(root / folder)).as_posix()
        for package, folder in package_dir.items()
        for path in (root / folder).rglob("*")
        if path.suffix in {".py", ".js", ".html", *COMPILED_LATER}
        or path.name in ("CMakeLists.txt", "README.md")
        or (path.suffix == ".yaml" and package == "maskrcnn.configs")
    }


def leaked(names: list[str]) -> list[str]:
    """The names in a wheel that lie outside the package and its own description."""
    return [
        name
        for name in names
        if (top := name.partition("/")[0]) in NOT_AT_THE_TOP or not (top == "maskrcnn" or top.endswith(".dist-info"))
    ]


def copy_of_sources(root: Path, target: Path, folders: list[str]) -> Path:
    """A copy of what a wheel is built from: a build leaves folders behind, and reads those it left before."""
    for folder in folders:
        shutil.copytree(root / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (root / name).is_file():
            shutil.copy(root / name, target)
    return target


def has_setuptools() -> bool:
    if importlib.util.find_spec("setuptools") is None:
        return False
    return int(version("setuptools").partition(".")[0]) >= 77


@pytest.fixture(scope="module")
def distributions(root, tmp_path_factory) -> list[Path]:
    """The source archive built from a copy of the repository, and the wheel built from that archive."""
    folders = list(settings(root)["package-dir"].values())
    source = copy_of_sources(root, tmp_path_factory.mktemp("source"), folders)
    (source / "tests").mkdir()  # bait: what setuptools would find by itself must not be installed
    (source / "tests" / "__init__.py").touch()
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(source)]
    if has_setuptools():
        command.append("--no-isolation")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def wheel(distributions) -> list[str]:
    """The names in the wheel."""
    (path,) = (each for each in distributions if each.suffix == ".whl")
    assert path.name.endswith("-py3-none-any.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_distributions_pass_the_check_of_the_package_index(distributions):
    assert len(distributions) == 2
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, distributions)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_version_is_stated(root):
    stated = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    newest = re.search(r"^## (\S+)", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert stated == maskrcnn.__version__ == newest[1]


def test_the_wheel_holds_recipes_benchmarks_and_licence(wheel):
    assert {"maskrcnn/configs/finetune.yaml", "maskrcnn/benchmarks/run.py"} <= set(wheel)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


def test_the_packages_are_the_folders(root):
    assert packages_on_disk(root, settings(root)["package-dir"]) == set(settings(root)["packages"])


def test_the_wheel_holds_every_file(wheel, root):
    missing = files_wanted(root, settings(root)["package-dir"]) - set(wheel)
    assert not missing, f"missing in the wheel: {sorted(missing)}"


def test_the_wheel_holds_the_sources_of_the_plugins(wheel):
    sources = {"kernels.h", "multilevel_roi_align/aot.cu", "batched_nms/kernel.cuh", "batched_nms/launch.cu"}
    assert {f"maskrcnn/plugins/csrc/{name}" for name in sources} <= set(wheel)


def test_nothing_leaks_from_the_wheel(wheel):
    assert not leaked(wheel)
