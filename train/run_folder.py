"""The folder of a run: where its config, metrics, checkpoints, sample and report are. Imports no torch."""

import errno
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from armillary.train.config.run_config import RunConfig, dump_config, load_config
from armillary.train.data.tokenizer import Tokenizer
from armillary.train.files import write_aside, write_json

ROOT = Path("runs")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside `runs/<name>/`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def sample(self) -> Path:
        return self.path / "sample.txt"

    def load_config(self) -> RunConfig:
        return load_config(self.config)

    def save_config(self, config: RunConfig) -> None:
        write_aside(self.config, dump_config(config).encode())


def create_run(
    config: RunConfig,
    config_path: str | Path,
    name: str,
    tokenizer: Tokenizer,
    fill: Callable[[RunFolder], None] = lambda folder: None,
) -> RunFolder:
    """Makes the folder of a new run and saves in it the resolved config, the tokenizer and facts of this machine.

    Args:
        config: the resolved config.
        config_path: the file it came from; its stem and the time make the name of a run that is given none.
        name: the run's name: letters, digits, dots, dashes and underscores; may be empty.
        tokenizer: of its data, kept so that the model can be used without them.
        fill: puts more into the folder before it has its name; if it raises, there is no new run.

    Raises:
        ValueError: if the name is not one, or a run of that name exists.
    """
    if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise ValueError(
            f"--name {name!r}: use letters, digits, '.', '-' and '_' only, starting with a letter or digit"
        )
    # Of what --name allows too, so that a shell takes it without quotes.
    stem = re.sub(r"[^A-Za-z0-9._-]+|^[^A-Za-z0-9]+", "-", Path(config_path).stem)[:100].lstrip("-._") or "run"
    stamp = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = [name] if name else [stamp, *(f"{stamp}-{number}" for number in range(2, 100))]
    # Made aside, so that a kill leaves no folder that is neither a run nor a free name.
    ROOT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=ROOT, ignore_cleanup_errors=True) as made:
        aside = RunFolder(Path(made) / "run")
        aside.path.mkdir()
        aside.save_config(config)
        write_json(aside.path / "run.json", machine_facts())
        tokenizer.save(aside.path)
        fill(aside)
        return RunFolder(_move_to_first(aside.path, [ROOT / name for name in names]))


def _move_to_first(made: Path, paths: list[Path]) -> Path:
    """Renames a folder to the first of the paths that is free."""
    for path in paths:
        try:
            os.rename(made, path)
            return path
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
    path = paths[0]
    raise ValueError(f"{path} exists; continue it with `armillary train --resume {path}`, or choose another --name")


def open_run(name: str | Path) -> RunFolder:
    """The folder of an existing run, by path or by its name in `runs/`.

    Raises:
        ValueError: if there is none.
    """
    for path in (Path(name), ROOT / name):
        if (path / "config.toml").is_file():
            return RunFolder(path)
    known = sorted(p.parent.name for p in ROOT.glob("*/config.toml")) if ROOT.is_dir() else []
    hint = f"runs here: {', '.join(known[-5:])}" if known else "there are no runs in ./runs; start one first"
    raise ValueError(f"{name}: is no run (it has no config.toml); {hint}")


def machine_facts() -> dict[str, object]:
    """Versions and host of this run, for the report."""
    versions = {}
    for package in ("armillary", "torch", "numpy", "safetensors", "tokenizers", "datasets"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions,
    }
