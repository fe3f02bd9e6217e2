"""`armillary parity`: a plan on gloo ranks against one process, on the same batches."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from armillary.launch.ranks import run_ranks
from armillary.train.config.run_config import check_vocabulary, dump_config, load_config
from armillary.train.data.dataset import prepare
from armillary.train.files import write_aside


def prove(
    config_path: Path, overrides: Sequence[str], plan: str, steps: int, dtype: str, debug: bool
) -> dict[str, Any]:
    """Runs both, prints and returns the errors.

    Returns the fields of `armillary parity --json`: `loss_error`, `gradient_error`, `parameter_error`, `worst_error`
    (the largest of the three), `worst_name`, `ranks`, `plan`, `ok`.

    Raises:
        ValueError: for a config or dtype that is refused.
        RunStopped, RuntimeError: if the ranks fail.
    """
    if dtype not in ("float64", "float32"):
        raise ValueError(f"--dtype {dtype}: allowed are float64 (the proof) and float32")
    config = load_config(config_path, [*overrides, f"optim.precision={dtype}"], plan)
    dataset = prepare(config.data, print)
    check_vocabulary(config, dataset.vocab_size)
    with tempfile.TemporaryDirectory(prefix="armillary-parity-") as folder:
        write_aside(Path(folder, "config.toml"), dump_config(config).encode())
        run_ranks(config.plan.num_ranks, "armillary.train.proof.parity", [folder, str(steps)], debug)
        from safetensors.torch import load_file

        from armillary.train.proof.parity import TOLERANCE, compare, trace_one_process

        errors = compare(load_file(Path(folder, "trace.safetensors")), trace_one_process(config, dataset, steps))
    ok = errors["worst_error"] <= TOLERANCE[dtype]
    print(
        f"{'equal' if ok else 'DIFFERENT'}: {config.plan} against one process, {steps} steps in {dtype}: "
        f"worst relative error {errors['worst_error']:.2e} ({errors['worst_name']}), allowed {TOLERANCE[dtype]:.0e}"
    )
    facts = {"ranks": config.plan.num_ranks, "plan": str(config.plan), "steps": steps, "dtype": dtype, "ok": ok}
    return {**errors, **facts}
