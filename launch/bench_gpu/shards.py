"""The loss over a vocabulary in shards, on one card: the ranks are threads of one process, which work in turn."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from armillary.kernels.cross_entropy import VocabShard, linear_cross_entropy
from armillary.launch.bench_gpu.compare import results


def in_shards(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, pull: Tensor) -> list[Tensor]:
    """Loss, and the gradients of `hidden` and `weight`, put together from three ranks of unequal shards."""
    vocab = len(weight)
    sizes = [vocab // 2, vocab // 3, vocab - vocab // 2 - vocab // 3]
    meeting = Meeting(len(sizes))
    parts = weight.detach().split(sizes)
    got: list[Any] = [None] * len(sizes)

    def rank(number: int) -> None:
        reductions = [meeting.reduction(number, op) for op in ("max", "sum")]
        shard = VocabShard(sum(sizes[:number]), max(sizes), *reductions)
        call = lambda h, w: linear_cross_entropy(h, w, labels, chunk, shard)  # noqa: E731
        got[number] = meeting.attend(lambda: results(call, [hidden, parts[number]], [pull]))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    meeting.check()
    losses, d_hidden, d_weight = zip(*got, strict=True)
    return [losses[0], torch.stack([d.float() for d in d_hidden]).sum(0).to(hidden.dtype), torch.cat(d_weight)]


class Meeting:
    """Threads that reduce tensors together, and of which one works at a time: Triton's interpreter is no thread's."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.turn = threading.Lock()
        self.tensors: list[Any] = [None] * size
        self.errors: list[BaseException] = []

    def attend(self, call: Callable[[], Any]) -> Any:
        """What `call` returns; where it raises, no other waits for it."""
        with self.turn:
            try:
                return call()
            except BaseException as error:  # kept for the thread that began this one
                self.errors.append(error)
                self.barrier.abort()
                return None

    def reduction(self, number: int, op: str) -> Callable[[Tensor], Tensor]:
        """Elementwise "max" or "sum", for rank `number`."""

        def reduce(tensor: Tensor) -> Tensor:
            self.tensors[number] = tensor
            self._wait()
            stacked = torch.stack(self.tensors)
            result = stacked.amax(0) if op == "max" else stacked.sum(0)
            self._wait()
            return result

        return reduce

    def _wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()

    def check(self) -> None:
        """Raises what a rank raised."""
        for error in self.errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
