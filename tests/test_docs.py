"""Every command of the documentation runs as it is written there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from armillary.launch.lab.permission import why_not

ROOT = Path(__file__).parent.parent
NO_LAB = why_not()


def commands(page: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder that looks like the root of a clone after `make setup`, with nothing run yet."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for tool in ("armillary", "torchrun"):
        (tmp_path / ".venv/bin" / tool).symlink_to(Path(sys.executable).parent / tool)
    # A link would not know the environment that it belongs to.
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "least"),
    [
        ("docs/first-run.md", 7),
        ("docs/kernels.md", 4),
        ("docs/context.md", 3),
        ("docs/pipeline.md", 1),
        ("docs/deepspeed.md", 2),
        ("docs/checkpoints.md", 2),
        ("docs/step.md", 2),
        pytest.param("docs/lab.md", 2, marks=[pytest.mark.lab, pytest.mark.skipif(bool(NO_LAB), reason=str(NO_LAB))]),
    ],
)
def test_commands_run_as_written(clone, page, least):
    found = commands(page)
    assert len(found) >= least
    for command in found:
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=240, check=False, env=os.environ
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_the_readme_begins_with_the_two_commands():
    """`.ci/run` runs these, word for word."""
    assert commands("README.md")[:2] == ["make demo", "make test"]


def test_the_table_of_choices_is_the_one_in_use():
    from armillary.kernels.attention.choice import CHOICES

    table = "".join(f"| {each.implementation} | {each.where} | {each.why} |\n" for each in CHOICES)
    assert f"|---|---|---|\n{table}\n" in (ROOT / "docs/kernels.md").read_text()


def test_every_page_that_is_linked_exists():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
