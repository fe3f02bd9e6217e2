"""FSDP2 under a pipeline: a stage is gathered once and its gradients reduced once a step, however many micro-batches.

torch's runtime gathers and frees (UNSHARD, RESHARD). What follows does what torch's own stage does for it; a stage
without FSDP is left as it is.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard


def hold(stage: nn.Module) -> None:
    """From here on backward passes add up gradients of whole weights, which stay gathered."""
    if isinstance(stage, FSDPModule):
        stage.set_is_last_backward(False)
        stage.set_reshard_after_backward(False)
        stage.set_requires_gradient_sync(False)


def stay_gathered(stage: nn.Module) -> None:
    """No module of the stage frees its weights after its forward pass."""
    if isinstance(stage, FSDPModule):
        stage.set_reshard_after_forward(False)


def reshard(stage: nn.Module) -> None:
    """Frees what is gathered. FSDP2's own reshard takes one module at a time."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def widen(stage: nn.Module) -> None:
    """Moves gradients that were added outside a backward pass into the wide sums that FSDP keeps between passes."""
    if isinstance(stage, FSDPModule):
        for group in _groups(stage):
            for parameter in group.fsdp_params:
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()


def reduce(stage: nn.Module) -> None:
    """Reduces the stage's gradients over its ranks and frees what was gathered."""
    if not isinstance(stage, FSDPModule):
        return
    stage.set_is_last_backward(True)
    stage.set_reshard_after_backward(True)
    stage.set_requires_gradient_sync(True)
    for group in _groups(stage):
        group.post_backward()
    _state(stage)._root_post_backward_final_callback()


def _state(stage: nn.Module) -> Any:
    return fully_shard.state(stage)  # type: ignore[attr-defined]


def _groups(stage: nn.Module) -> Iterator[Any]:
    for state in _state(stage)._state_ctx.all_states:
        # torch 2.11 has one group of parameters a module, or None; 2.13 has a list.
        several = getattr(state, "_fsdp_param_groups", None)
        one = getattr(state, "_fsdp_param_group", None)
        yield from several if several is not None else [one] * (one is not None)
