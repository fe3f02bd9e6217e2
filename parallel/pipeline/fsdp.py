"""FSDP2 under a pipeline: a stage is gathered once and its gradients reduced once a step, however many micro-batches.

torch's runtime gathers and frees (UNSHARD, RESHARD). What follows does what torch's own stage does for it.
"""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


class Sharded:
    """The FSDP modules of one stage, found once. A stage without FSDP has none, and is left as it is."""

    def __init__(self, stage: nn.Module) -> None:
        self.root = stage if isinstance(stage, FSDPModule) else None
        self.modules = [module for module in stage.modules() if isinstance(module, FSDPModule)]

    def stay_gathered(self) -> None:
        """No module frees its weights after its forward pass."""
        for module in self.modules:
            module.set_reshard_after_forward(False, recurse=False)

    def hold(self) -> None:
        """From here on backward passes add up gradients of whole weights, which stay gathered."""
        self._reduce_after_backward(False)

    def reshard(self) -> None:
        """Frees what is gathered. FSDP2's own reshard takes one module at a time."""
        for module in self.modules:
            module.reshard()

    def widen(self) -> None:
        """Moves gradients that were added outside a backward pass into the wide sums that FSDP keeps between passes."""
        for group in self._groups():
            for parameter in group.fsdp_params:
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()

    def reduce(self) -> None:
        """Reduces the stage's gradients over its ranks and frees what was gathered."""
        if self.root is not None:
            self._reduce_after_backward(True)
            for group in self._groups():
                group.post_backward()
            self.root._get_fsdp_state()._root_post_backward_final_callback()

    def _reduce_after_backward(self, reduce: bool) -> None:
        if self.root is not None:
            self.root.set_is_last_backward(reduce)
        for module in self.modules:
            module.set_reshard_after_backward(reduce, recurse=False)
            module.set_requires_gradient_sync(reduce, recurse=False)

    def _groups(self) -> list[Any]:
        states: list[Any] = [module._get_fsdp_state() for module in self.modules]
        # torch 2.11 has one group of parameters a module, or None; 2.13 has a list.
        if states and hasattr(states[0], "_fsdp_param_groups"):
            return [group for state in states for group in state._fsdp_param_groups]
        return [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]
