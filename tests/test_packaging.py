"""The wheel holds exactly the tree, and works when installed elsewhere."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["kernels", "comm", "parallel", "train", "launch"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: setuptools leaves a build/ behind, and would put into the next wheel what was removed since.
    source = folder / "source"
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = folder.glob("armillary-*.whl")
    return found


def test_every_room_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    nested = [p.parent.relative_to(ROOT) for room in ROOMS for p in (ROOT / room).glob("**/*.py")]
    assert sorted(listed) == sorted({f"armillary.{'.'.join(folder.parts)}" for folder in nested})


def test_the_links_for_type_checkers_are_the_rooms():
    links = {link.name: link.resolve() for link in (ROOT / ".pkg/armillary").iterdir()}
    assert links == {room: ROOT / room for room in ROOMS}


@pytest.mark.slow
def test_the_wheel_is_the_tree(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tree = {f"armillary/{p.relative_to(ROOT)}" for room in ROOMS for p in (ROOT / room).glob("**/*.py")}
    assert held == tree


@pytest.mark.slow
def test_the_wheel_works_elsewhere(wheel, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    code = (
        "import armillary.train.config.run_config as c, armillary.launch.cli; "
        f"assert c.__file__.startswith({str(target)!r}), c.__file__; print('ok')"
    )
    # -P keeps the repository out of the path; the target comes before the editable install.
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.strip() == "ok"


def make(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and first line of what `make` tells of a mistake in a folder with the project's Makefile alone."""
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    done = subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.partition("\n")[0]


def test_an_old_python_is_refused_with_one_sentence(tmp_path):
    python = tmp_path / "python3.10"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    code, told = make(tmp_path, "setup", f"PYTHON={python}")
    assert code == 2
    assert told == "error: Armillary needs Python 3.11 or newer; name one with: make setup PYTHON=python3.12"
    assert not (tmp_path / ".venv").exists()


def test_a_clone_that_was_moved_is_told_to_install_anew(tmp_path):
    folder = tmp_path / "a new 'place'"
    (folder / ".venv").mkdir(parents=True)
    (folder / ".venv/installed").write_text("/old place\n")
    code, told = make(folder, "setup")
    assert code == 2
    assert ".venv was made in /old place, and this folder is another; run: make clean setup" in told
    assert make(folder, "clean") == (0, "")
    (folder / ".venv").mkdir()
    (folder / "pyproject.toml").touch()
    (folder / ".venv/installed").write_text(f"{folder}\n")
    assert make(folder, "--touch", "setup") == (0, "")
