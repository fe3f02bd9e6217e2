"""One stage of a pipeline, with the methods by which torch's runtime drives it.

torch's own stage knows one shape for all micro-batches and sends past our ledger. This one knows each micro-batch's
shape from its places, moves its messages itself (the runtime gets no operations to start, and waits for none), divides
the loss before backward, and splits backward in its own way (pipeline/split_backward.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from armillary.kernels.attention.places import Places
from armillary.parallel.pipeline.fsdp import Sharded
from armillary.parallel.pipeline.later import Later, Owed, pay
from armillary.parallel.pipeline.mail import Letter, Mail
from armillary.parallel.pipeline.split_backward import split_backward
from armillary.parallel.runner import Part

HiddenShape = Callable[[Places], tuple[int, ...]]


class Stage:
    """A stage module and what it holds of the micro-batches under way.

    The module is called with tokens or hidden, places, and labels on the last stage; see parallel/pipeline/runner.py.
    """

    has_backward = True

    def __init__(self, module: nn.Module, index: int, mail: Mail, hidden: HiddenShape, splits_backward: bool) -> None:
        self.submod, self.stage_index, self.mail, self.hidden = module, index, mail, hidden
        self.num_stages = len(mail.stage_ranks)
        self.group, self.device = mail.group, mail.device
        self.group_rank, self.group_size = mail.group.rank(), mail.group.size()
        # The runtime writes it; nothing here reads it.
        self.stage_index_to_group_rank: dict[int, int] = {}
        self._later = split_backward(module) if splits_backward else Later()
        self.stream: torch.cuda.Stream | None = None
        self.sharded = Sharded(module)
        self.sharded.stay_gathered()
        self.begin((), torch.ones((), device=self.device))

    @property
    def is_first(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.num_stages - 1

    def begin(self, parts: Sequence[Part], divisor: Tensor) -> None:
        """Readies the stage for a step; forgets whatever a step that failed has left."""
        self.parts, self.divisor = parts, divisor
        self.total = torch.zeros((), device=self.device, dtype=torch.float64)
        self.clear_runtime_states()
        # An evaluation may have left weights gathered that have changed since.
        self.sharded.reshard()
        self.sharded.hold()

    def clear_runtime_states(self) -> None:
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        # Of each micro-batch between its forward and backward: the input, and where backward starts. The output itself
        # is not kept: no node needs its values.
        self._kept: dict[int, tuple[Tensor, GradientEdge]] = {}
        self._output_gradients: dict[int, Tensor] = {}
        self._input_gradients: dict[int, Tensor] = {}
        self._owed: dict[int, list[Owed]] = {}

    @property
    def is_clear(self) -> bool:
        """Whether nothing of any micro-batch is left."""
        held = (self._inputs, self._outputs, self._kept, self._output_gradients, self._input_gradients, self._owed)
        return not any(held)

    # Messages: the runtime asks for operations to start, and is given none, since they are started here.

    def get_fwd_recv_ops(self, micro_batch: int) -> list[Any]:
        shape = self.hidden(self.parts[micro_batch].places)
        self.mail.expect(Letter(self.stage_index - 1, micro_batch, True), shape)
        return []

    def get_fwd_send_ops(self, micro_batch: int) -> list[Any]:
        with self.on_stream():
            self.mail.send(Letter(self.stage_index, micro_batch, True), self._outputs.pop(micro_batch))
        return []

    def get_bwd_recv_ops(self, micro_batch: int) -> list[Any]:
        shape = self.hidden(self.parts[micro_batch].places)
        self.mail.expect(Letter(self.stage_index + 1, micro_batch, False), shape)
        return []

    def get_bwd_send_ops(self, micro_batch: int) -> list[Any]:
        with self.on_stream():
            self.mail.send(Letter(self.stage_index, micro_batch, False), self._input_gradients.pop(micro_batch))
        return []

    def set_local_fwd_input(self, output: Tensor, micro_batch: int) -> None:
        """Hidden from the stage before, on this rank."""
        self._inputs[micro_batch] = output

    def get_local_bwd_output(self, micro_batch: int) -> Tensor:
        return self._input_gradients.pop(micro_batch)

    def set_local_bwd_input(self, gradient: Tensor, micro_batch: int) -> None:
        """The gradient of hidden from the stage after, on this rank."""
        self._output_gradients[micro_batch] = gradient

    # Computing.

    def forward_one_chunk(self, micro_batch: int, *_args: Any, **_options: Any) -> Tensor:
        """Forward of one micro-batch: hidden without its graph, or the loss's sum over the divisor, 0-d."""
        with self.on_stream():
            part = self.parts[micro_batch]
            x = part.tokens if self.is_first else self._use(self._input(micro_batch)).requires_grad_()
            output = self.submod(x, part.places, part.labels if self.is_last else None)
            if self.is_last:
                output = output / self.divisor
                self.total += output.detach()
            self._kept[micro_batch] = (x, get_gradient_edge(output))
            output = output.detach()
            if not self.is_last and not self.mail.local(self.stage_index + 1):
                self._outputs[micro_batch] = output
            return output

    def _input(self, micro_batch: int) -> Tensor:
        if self.mail.local(self.stage_index - 1):
            return self._inputs.pop(micro_batch)
        return self.mail.open(Letter(self.stage_index - 1, micro_batch, True))

    def backward_one_chunk(
        self, micro_batch: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Backward of one micro-batch, of which `full_backward=False` puts off what `backward_weight_one_chunk` does.

        `loss` and `last_backward` are the runtime's; it knows no loss of ours, and we reduce at REDUCE_GRAD.
        """
        with self.on_stream():
            x, edge = self._kept.pop(micro_batch)
            gradient = None if self.is_last else self._use(self._output_gradient(micro_batch))
            self._later.owed = None if full_backward else []
            torch.autograd.backward(edge, gradient)
            if self._later.owed is not None:
                self._owed[micro_batch], self._later.owed = self._later.owed, None
            if not self.is_first:
                assert x.grad is not None
                self._input_gradients[micro_batch] = x.grad

    def _output_gradient(self, micro_batch: int) -> Tensor:
        if self.mail.local(self.stage_index + 1):
            return self._output_gradients.pop(micro_batch)
        gradient = self.mail.open(Letter(self.stage_index + 1, micro_batch, False))
        # The stage after has answered, so what it answers to has arrived there.
        self.mail.settle(Letter(self.stage_index, micro_batch, True))
        return gradient

    def backward_weight_one_chunk(self, micro_batch: int, last_backward: bool = False) -> None:
        """Computes what a backward with `full_backward=False` has put off."""
        with self.on_stream():
            pay(self._owed.pop(micro_batch))
            self.sharded.widen()

    def perform_reduce_grad(self, grad_scale_factor: int = 1) -> None:
        """Reduces gradients over the stage's ranks, once a step."""
        assert grad_scale_factor == 1, grad_scale_factor
        with self.on_stream():
            self.sharded.reduce()

    def _use(self, tensor: Tensor) -> Tensor:
        """Tells the allocator that a tensor made on another stream is used on the stage's."""
        if self.stream is not None:
            tensor.record_stream(self.stream)
        return tensor

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Computes on the stage's own stream, if it has one, after what the current one has to do and before what it
        is given next: so two stages run at once only if both begin before either ends."""
        if self.stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)
