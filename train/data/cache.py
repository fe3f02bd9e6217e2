"""A cache of folders that are made once and are whole or absent, whoever is killed and however many make them at once.

The caller names a folder by a `digest` of what it is made from, so another input is another folder. Its manifest has
size and hash of every file, by which a damaged one is noticed and made again. Imports no torch.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from armillary.train.files import sync_folder, write_json

HASHED_BYTES = 1 << 28
"""Cached files up to this size are checked by their hash when they are opened, larger ones by their size alone."""
MANIFEST = "manifest.json"

Report = Callable[[str], None]
"""Takes one line for the user."""


def digest(*values: Any) -> str:
    """Hash of values that JSON can write."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()


def cache_folder(setting: str, report: Report) -> Path:
    """`setting`, or else where caches belong on this machine, or else `.cache/armillary` here."""
    if setting:
        return Path(os.path.expanduser(setting))
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    usual = Path(os.environ.get("ARMILLARY_CACHE") or Path(base) / "armillary")
    try:
        usual.mkdir(parents=True, exist_ok=True)
        if os.access(usual, os.W_OK):
            return usual
    except OSError:
        pass
    here = Path(".cache/armillary").absolute()
    report(f"{usual} cannot be written; tokens are kept in {here} (ARMILLARY_CACHE or data.cache names another place)")
    return here


def open_or_build(folder: Path, build: Callable[[Path], dict[str, Any]], report: Report) -> dict[str, Any]:
    """The manifest of a finished folder, which is built first if it is missing or damaged.

    Built aside under a lock and renamed, so that it is whole or absent, whoever is killed and however many build at
    once. The manifest is what `build(folder)` returned, with size and hash of every file.

    Raises:
        OSError: if it cannot be written.
    """
    from filelock import FileLock, Timeout

    if not isinstance(found := _check(folder), str):
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        try:
            lock.acquire(timeout=0.1)
        except Timeout:
            report(f"waiting for another process that prepares the same data in {folder.parent}")
            lock.acquire()
        try:
            return _build(folder, build, report)
        finally:
            lock.release()
    except OSError as error:
        raise OSError(
            error.errno,
            f"the data cache {folder.parent} cannot be written ({error.strerror}); make room there, or set data.cache "
            "(or ARMILLARY_CACHE) to another folder",
        ) from error


def _build(folder: Path, build: Callable[[Path], dict[str, Any]], report: Report) -> dict[str, Any]:
    """Under the lock: what was left half-made by a killed process is removed."""
    if folder.exists():
        found = _check(folder)
        if not isinstance(found, str):
            return found
        report(f"{folder} is damaged ({found}); it is made again")
        shutil.rmtree(folder)
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir()
        manifest = build(aside)
        files = sorted(aside.iterdir())
        manifest["files"] = {path.name: {"size": path.stat().st_size, "hash": _file_hash(path)} for path in files}
        for path in files:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        # Last, since it syncs the names in the folder too.
        write_json(aside / MANIFEST, manifest)
        os.rename(aside, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def _check(folder: Path) -> dict[str, Any] | str:
    """The manifest of a folder, or what is wrong with it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, fact in manifest["files"].items():
            if (folder / name).stat().st_size != fact["size"]:
                return f"{name} has another size"
            if fact["size"] <= HASHED_BYTES and _file_hash(folder / name) != fact["hash"]:
                return f"{name} has another hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return manifest


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
