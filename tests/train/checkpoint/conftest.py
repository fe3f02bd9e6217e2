"""Checkpoints for the tests of what lies on disk."""

from pathlib import Path

import pytest
from checkpoint_helpers import numpy_checkpoint


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A folder with steps 100 and 200."""
    numpy_checkpoint(tmp_path / "step-00000100", 100)
    numpy_checkpoint(tmp_path / "step-00000200", 200, value=0.5)
    return tmp_path
