"""The held-out loss of a run's checkpoint."""

from typing import Any

from armillary.train.checkpoint.restore import check_same_data
from armillary.train.data.dataset import held_out_batches, prepare
from armillary.train.loaded_run import loaded_run


def evaluate_run(run: str) -> dict[str, Any]:
    """Loss (nats a token) and bits per byte over all held-out sequences, with the newest sound checkpoint.

    Raises:
        ValueError: if there is no such run, it has no sound checkpoint, its corpus holds nothing out or has changed.
    """
    with loaded_run(run) as loaded:
        dataset = prepare(loaded.config.data, print)
        if "imported" not in loaded.facts:  # what an imported model was trained on is not known
            check_same_data(loaded.checkpoint, loaded.facts, dataset)
        if dataset.num_held_out == 0:
            raise ValueError(f"{run}: the corpus holds nothing out; set data.held_out higher, and train a new run")
        batches = held_out_batches(dataset, None, loaded.config.data.batch_size, 0, 1)
        loss, bits_per_byte = loaded.engine.evaluate(batches, dataset)
    return {"run": run, "step": loaded.step, "loss": loss, "bits_per_byte": bits_per_byte}
