"""Files that are whole or not there, whoever is killed meanwhile. The standard library alone."""

import errno
import json
import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Makes names that were created, renamed or removed in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems order names themselves and refuse this.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_aside(path: Path, data: bytes) -> None:
    """Writes a file so that its name only ever shows the whole old or the whole new content, even after a power cut.

    Written to a temporary name in the same folder, fsynced, renamed, folder fsynced.

    Raises:
        OSError: naming the file, with nothing left behind.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk names none
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    """`write_aside` of `value` as JSON for people to read."""
    write_aside(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def safe_join(folder: Path, name: str) -> Path:
    """`folder / name` for a name that was read from a file.

    Raises:
        ValueError: if the name is absolute, has an empty, `.` or `..` part, or leads out of `folder` through a link.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in name or "\\" in name or ":" in parts[0]:
        raise ValueError(f"{folder}: {name!r} is no name of a file inside it; it must be relative, without '..'")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}: {name!r} leads out of it through a link; put the file itself there")
    return path
