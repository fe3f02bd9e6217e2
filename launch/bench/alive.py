"""What torch's operations allocate and copy while a piece of code runs, by the file that called them."""

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from armillary.parallel.held import local

COPIES = ("copy_", "_to_copy", "clone", "cat", "stack", "_local_scalar_dense")
"""Operations that move numbers about; the last brings one of them to Python."""


class Alive(TorchDispatchMode):
    """Watches torch's operations. After it, `peak` has the bytes of the fullest moment, by kind; `copies` and `copied`
    how often each operation of `COPIES` ran, and its bytes, by the code that called it."""

    def __init__(self, known: dict[str, list[Tensor]]) -> None:
        """`known` are tensors that are there already, by their kind."""
        super().__init__()
        self.peak: Counter[str] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.copied: Counter[tuple[str, str]] = Counter()
        self._alive: dict[int, tuple[StorageWeakRef, str]] = {}
        for kind, tensors in known.items():
            for tensor in tensors:
                self._meet(tensor, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name in COPIES:
            self.copies[name, _origin()] += 1
            self.copied[name, _origin()] += results.nbytes if isinstance(results, Tensor) else 0
        met = [self._meet(leaf, "") for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        if any(met):
            now: Counter[str] = Counter()
            for reference, kind in list(self._alive.values()):
                now[kind] += _bytes(reference)
            if now.total() > self.peak.total():
                self.peak = now
            self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
        return results

    def _meet(self, tensor: Tensor, kind: str) -> bool:
        storage = local(tensor.detach()).untyped_storage()
        if storage._cdata in self._alive and not self._alive[storage._cdata][0].expired():
            return False
        self._alive[storage._cdata] = StorageWeakRef(storage), kind or _origin()
        return True


def _bytes(reference: StorageWeakRef) -> int:
    storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    return 0 if storage is None else storage.nbytes()


def _origin() -> str:
    """The file of ours, or of FSDP, whose code runs now."""
    frame: Any = sys._getframe(1)
    backward = ""
    while frame is not None:
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        if function == "_engine_run_backward":
            return "backward, torch's own nodes"
        if function == "backward":
            backward = ", backward"
        if "/fsdp/_fully_shard/" in path:
            return "FSDP"
        folders = path.rsplit("/", 3)[-3:]
        for start, folder in enumerate(folders):
            if folder in ("kernels", "comm", "parallel", "train"):
                return "/".join(folders[start:]) + backward
        frame = frame.f_back
    return "elsewhere"
