"""Saving a run's state in the background.

`Checkpointer.save` copies the state into host memory, the only stall; a thread of each rank then writes that rank's
shards, reads them back, and describes them in a part file; rank 0's thread waits for every part, merges them into the
manifest and publishes the folder (train/checkpoint/store.py has the layout, train/checkpoint/load.py loads it). The
threads meet in the file system alone: no collective runs beside the training. A rank that fails removes its data and
leaves its reason for rank 0, which then removes the folder; older checkpoints stay, and training goes on.
"""

import errno
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from armillary.train.checkpoint.local_part import Local, owner, whole_part
from armillary.train.checkpoint.manifest import (
    Manifest,
    Shard,
    Stored,
    StoredFile,
    decode_manifest,
    encode_manifest,
    merge_parts,
    tensor_name,
)
from armillary.train.checkpoint.store import CheckpointConfig, prune, publish, step_name, sweep
from armillary.train.checkpoint.verify import read_header, verify_file
from armillary.train.files import write_aside
from armillary.train.words import few


@dataclass(frozen=True)
class Snapshot:
    """What one rank is about to write: every tensor it knows of, and the data of those it writes, in host memory."""

    step: int
    number: int
    folder: Path
    locals: Mapping[str, Local]
    data: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class Checkpointer:
    """Writes a rank's share of checkpoints in a thread. Every rank makes one, and saves at the same steps.

    Args:
        folder: `checkpoints/`, on a file system that all ranks see.
        config: how many to keep (when to save is the caller's).
        rank, num_ranks: of the whole run.
        attempt: a short name of this start of the run, the same on all ranks and new at each start.
        report: takes a sentence about a failure; called from the thread too.
        patience_seconds: how long rank 0 waits for the other ranks' parts; shorter than the time that a collective
            waits, so that a save that fails so does not end the run.
    """

    failure: str | None
    """Why the newest save failed; None while it is being written and when it is complete."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        rank: int,
        num_ranks: int,
        attempt: str,
        report: Callable[[str], None],
        patience_seconds: float = 300.0,
    ) -> None:
        assert re.fullmatch(r"\w{1,64}", attempt), attempt
        self.folder, self.config, self.rank, self.num_ranks = Path(folder), config, rank, num_ranks
        self.attempt, self.report, self.patience_seconds = attempt, report, patience_seconds
        self.failure = None
        self._number = 0
        self._staged: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None

    def save(self, step: int, shared: Mapping[str, Local], own: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Copies the state and starts to write it; waits first for a save that is still being written.

        Args:
            step: the step after which this is; a checkpoint of the same step is replaced.
            shared: this rank's parts of the run's state, under the same names on all ranks that hold any of it. Those
                that write hold each element once between them.
            own: what belongs to this rank, such as its random state.
            facts: small JSON; rank 0's is kept.

        Raises:
            ValueError: if a name or dtype cannot be stored, or the facts are no JSON.
        """
        self.wait()
        self.failure = None
        self._number += 1
        kept_facts = json.loads(json.dumps(dict(facts), allow_nan=False)) if self.rank == 0 else {}
        unfinished = self.folder / f"{step_name(step)}.tmp-{self.attempt}-{self._number}"
        held = {tensor_name(name): part for name, part in shared.items()}
        for name in held:
            if owner(name) is not None:
                raise ValueError(f"tensor {name!r}: names that begin with 'rank-<number>/' are for a rank's own state")
        for name, tensor in own.items():
            full_name = tensor_name(f"rank-{self.rank}/{name}")
            held[full_name] = whole_part(full_name, tensor)
        data = self._copy({name: it.data for name, it in held.items() if it.writes and it.box.volume})
        snapshot = Snapshot(step, self._number, unfinished, held, data, kept_facts)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when this rank's part is written; on rank 0, when the checkpoint is published or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, in the same buffers each time: fresh pages would cost more than the copy."""
        staged = {}
        for name, tensor in tensors.items():
            buffer = self._staged.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            staged[name] = buffer.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        self._staged = staged
        return staged

    def _write(self, snapshot: Snapshot) -> None:
        """The thread: an error ends the save, never the training."""
        try:
            snapshot.folder.mkdir(parents=True, exist_ok=True)
            problem = self._write_own_part(snapshot)
            if self.rank == 0:
                self._tidy(self._publish(snapshot, problem), snapshot)
            elif problem is not None:
                self._fail(f"this rank's part of {step_name(snapshot.step)} was not saved: {problem}")
        except Exception as error:
            if self.rank == 0:
                shutil.rmtree(snapshot.folder, ignore_errors=True)
            self._fail(
                f"checkpoint {step_name(snapshot.step)} was not saved: {self._explain(error, snapshot)}. Training goes "
                "on, and older checkpoints stay"
            )

    def _write_own_part(self, snapshot: Snapshot) -> str | None:
        """Writes this rank's part, or removes what there is of it and leaves a marker; returns what went wrong."""
        tensors, part, marker = (
            snapshot.folder / f"rank-{self.rank:05d}.{kind}" for kind in ("safetensors", "json", "failed")
        )
        try:
            write_aside(part, encode_manifest(write_tensors(tensors, snapshot, self.num_ranks)))
        except Exception as error:
            tensors.unlink(missing_ok=True)
            problem = self._explain(error, snapshot)
            try:
                write_aside(marker, problem.encode())
            except OSError:
                marker.touch()  # a name alone may still fit on a full disk
            return problem
        return None

    def _publish(self, snapshot: Snapshot, problem: str | None) -> Path:
        """Rank 0: merges all parts and publishes them. Raises what went wrong here or on any rank."""
        failures = self._await_parts(snapshot) | ({0: problem} if problem is not None else {})
        if failures:
            raise RuntimeError(few([f"rank {rank}: {text}" for rank, text in sorted(failures.items())]))
        parts = [snapshot.folder / f"rank-{rank:05d}.json" for rank in range(self.num_ranks)]
        manifest = merge_parts(decode_manifest(part.read_bytes()) for part in parts)
        write_aside(snapshot.folder / "manifest.json", encode_manifest(manifest))
        for part in parts:
            part.unlink()
        return publish(snapshot.folder, snapshot.step)

    def _tidy(self, published: Path, snapshot: Snapshot) -> None:
        """Points to the new checkpoint and removes what it outdates. It is saved whether or not this works."""
        for task in (
            lambda: write_aside(self.folder / "latest", f"{published.name}\n".encode()),
            lambda: prune(published, self.config.keep),
            lambda: sweep(self.folder, self.attempt, snapshot.number),
        ):
            try:
                task()
            except OSError as error:
                self.report(f"{published.name} is saved, but {self.folder} is untidy: {self._explain(error, snapshot)}")

    def _await_parts(self, snapshot: Snapshot) -> dict[int, str]:
        """Waits until every rank has left its part or its failure; returns the failures by rank."""
        waiting, failures = set(range(self.num_ranks)), dict[int, str]()
        deadline, pause = time.monotonic() + self.patience_seconds, 0.002
        while True:
            names = set(os.listdir(snapshot.folder))
            failed = {rank for rank in waiting if f"rank-{rank:05d}.failed" in names}
            for rank in failed:
                text = (snapshot.folder / f"rank-{rank:05d}.failed").read_text()
                failures[rank] = text or "it could not write why; its disk may be full"
            waiting -= failed | {rank for rank in waiting if f"rank-{rank:05d}.json" in names}
            if not waiting:
                return failures
            if time.monotonic() > deadline:
                return failures | dict.fromkeys(
                    waiting,
                    f"nothing came within {self.patience_seconds:g} s; {self.folder} must be on a file system that all "
                    "ranks share",
                )
            time.sleep(pause)
            pause = min(1.5 * pause, 0.2)

    def _fail(self, sentence: str) -> None:
        self.failure = sentence
        self.report(sentence)

    def _explain(self, error: Exception, snapshot: Snapshot) -> str:
        """An error in words; the message of safetensors' writer carries the number of the system's error."""
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT):
            needed = sum(tensor.nbytes for tensor in snapshot.data.values()) / 1e6
            existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
            free = shutil.disk_usage(existing).free / 1e6
            return (
                f"the disk of {self.folder} is full (rank {self.rank} needs {needed:.1f} MB, {free:.1f} MB are free); "
                "free some space, or set checkpoint.keep lower"
            )
        return str(error) or type(error).__name__


def write_tensors(path: Path, snapshot: Snapshot, num_ranks: int) -> Manifest:
    """Writes a rank's tensors to a safetensors file, syncs it and reads it back; returns the rank's part manifest.

    Raises:
        OSError: if the file cannot be written, or what is read back is not what was written.
        SafetensorError: the same, from the library.
    """
    checksums = {name: _checksum(tensor) for name, tensor in snapshot.data.items()}
    tensors = {
        name: Stored(
            local.dtype,
            local.shape,
            (Shard(path.name, local.box, checksums[name]),) if name in checksums else (),
        )
        for name, local in snapshot.locals.items()
    }
    files = {}
    if checksums:
        save_file(dict(snapshot.data), path)
        path.chmod(path.parent.stat().st_mode & 0o666)  # the library lets no one else read
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                # So that the bytes come back from the disk, not from the cache that they were written to.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(file.fileno()).st_size
            files[path.name] = StoredFile(size, read_header(file, size)[1])
    part = Manifest(snapshot.step, num_ranks, snapshot.facts, files, tensors)
    for name, held in part.held_by().items():
        problems = verify_file(path.with_name(name), files[name], held)
        if problems:
            raise OSError(f"what was written to the disk is not what comes back: {few(problems)}")
    return part


def _checksum(tensor: Tensor) -> str:
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_128_hexdigest(array)
