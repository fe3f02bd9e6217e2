"""Starts DeepSpeed in the ranks that we have joined: quietly, on our process groups, compiling nothing.

DeepSpeed keeps its accelerator, its communication backend and its groups in globals of its own; here they are set, for
the newest engine. What it wants of the environment is put back. What it writes to stdout goes to stderr.
"""

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from armillary.parallel.mesh import Ranks
from armillary.parallel.tensor.project import Enter
from armillary.train.deepspeed.counted import count_bytes
from armillary.train.optim.schedule import OptimConfig

INSTALL = 'pip install "armillary[deepspeed]"'


class Mesh:
    """What DeepSpeed calls an mpu: it asks for the groups by these names."""

    def __init__(self, ranks: Ranks) -> None:
        self.data, self.model = ranks.plane.get_group(), ranks.tensor

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that shard state: dp x cp."""
        return self.data

    def get_data_parallel_world_size(self) -> int:
        return self.data.size()

    def get_data_parallel_rank(self) -> int:
        return self.data.rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The tensor ranks."""
        return self.model

    def get_model_parallel_world_size(self) -> int:
        return self.model.size()

    def get_model_parallel_rank(self) -> int:
        return self.model.rank()


def check_installed() -> None:
    """Raises ValueError, with the command that installs it, if DeepSpeed is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f'zero.engine: deepspeed is not installed; run {INSTALL}, or set zero.engine = "fsdp"')


def start(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int, config: OptimConfig, ranks: Ranks) -> Any:
    """A DeepSpeed engine around a whole, allocated model; its weights are rank 0's afterwards.

    Gradients are summed over the plane by stages 1 and 2 and averaged by stage 3, in float32 or float64.

    Args:
        model: float32, or float64 for that precision; cast to bfloat16 here where that is the compute dtype.
        optimizer: over the model's parameters; DeepSpeed puts its flat partitions in their place.
        stage: 1, 2 or 3.

    Raises:
        ValueError: if DeepSpeed is not installed.
    """
    check_installed()
    wide = config.precision == "float64"
    with environment(ranks), _quiet():
        from deepspeed.runtime.config import DeepSpeedConfig

        count_bytes(ranks.ledger, ranks.device)
        mesh = Mesh(ranks)
        settings = _settings(model, stage, config)
        with _wide_masters(wide):
            engine = _engine_class(wide)(
                args=None,
                model=model,
                optimizer=optimizer,
                mpu=mesh,
                dist_init_required=False,
                config=settings,
                config_class=DeepSpeedConfig(settings, mesh),
            )
        if stage == 3:
            _tell_of_readers(model)
    if wide:
        _reduce_in_float64(engine.optimizer)
    return engine


def _tell_of_readers(model: nn.Module) -> None:
    """Tells stage 3 that a tensor-parallel `Enter` reads the parameters of other modules. It finds out by itself, but
    only of those that it had to gather in the first forward pass: a recomputation would lack the others, the biases."""
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter

    for module in model.modules():
        if isinstance(module, Enter):
            for parameter in [parameter for layer in module.layers for parameter in layer.parameters()]:
                register_external_parameter(module, parameter)


def _settings(model: nn.Module, stage: int, config: OptimConfig) -> dict[str, Any]:
    elements = sum(parameter.numel() for parameter in model.parameters())
    vectors = [parameter.numel() for parameter in model.parameters() if parameter.ndim < 2]
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(50_000_000, elements)}
    if stage == 3:
        # Norms and biases stay whole on every rank, as in our own engine they would cost more messages than bytes.
        zero["stage3_param_persistence_threshold"] = max(vectors, default=0)
    else:
        zero["compute_grad_norm"] = False  # ours is taken before the step
    settings: dict[str, Any] = {
        # What a step has is our business: it is told to each backward pass.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "communication_data_type": "fp32",
        "gradient_clipping": 0.0,  # clipped before the step too
    }
    if stage < 3:
        settings["gradient_allreduce_op"] = "sum"
    if config.precision == "bfloat16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": False}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _engine_class(wide: bool) -> Any:
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine

    class Engine(DeepSpeedEngine):
        def get_data_types(self) -> Any:
            """DeepSpeed's list of dtypes has no float64."""
            return (torch.float64, torch.float64) if wide else super().get_data_types()

        def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> Any:
            """Left alone, it would take another optimizer for stage 1 in bfloat16 than for all the rest."""
            return ZERO_OPTIMIZATION

    return Engine


@contextlib.contextmanager
def _wide_masters(wide: bool) -> Iterator[None]:
    """DeepSpeed's master weights are float32 whatever the model is; here they are float64 for a float64 model."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    chosen = ZeROOptimizer._configure_master_weights

    def configure(self: Any, **facts: Any) -> torch.dtype:
        chosen(self, **facts)
        return torch.float64

    if wide:
        ZeROOptimizer._configure_master_weights = configure
    try:
        yield
    finally:
        ZeROOptimizer._configure_master_weights = chosen


def _reduce_in_float64(optimizer: Any) -> None:
    """DeepSpeed takes no float64 for reductions when it is made; afterwards it does what it is told."""
    (bucket,) = optimizer.ipg_buckets.values()
    if isinstance(bucket.buffer, Tensor):
        bucket.buffer = bucket.buffer.double()
    optimizer.ipg_buckets = {torch.float64: bucket}
    optimizer.communication_data_type = torch.float64


@contextlib.contextmanager
def environment(ranks: Ranks) -> Iterator[None]:
    """What DeepSpeed reads of the environment, when it starts and now and then later; put back at the end."""
    before = dict(os.environ)
    os.environ.update(LOCAL_RANK=str(ranks.device.index or 0), DS_ACCELERATOR=ranks.device.type)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        # Its logger is made at import, and keeps the stream that it is given.
        with contextlib.redirect_stdout(sys.stderr):
            import deepspeed  # noqa: F401

            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
            yield
    finally:
        logging.disable(logging.NOTSET)
