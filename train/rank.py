"""One rank of a run, from its command line to the end: what the ranks must agree on before they train together."""

import argparse
import secrets
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from armillary.parallel.mesh import Ranks, joined_ranks
from armillary.train.config.run_config import RunConfig, check_vocabulary, dump_config, load_config
from armillary.train.data.cache import digest
from armillary.train.data.config import from_anywhere
from armillary.train.data.dataset import Dataset, prepare
from armillary.train.initial_weights import checked_weights
from armillary.train.observe.sinks import Ending
from armillary.train.run_folder import RunFolder, create_run, open_run
from armillary.train.trainer import Trainer


def run_rank(options: argparse.Namespace) -> None:
    """One rank of `python -m armillary.train`, from its command line to the end of the run."""
    source = open_run(options.resume).config if options.resume else options.config
    config = load_config(source, options.overrides, options.plan)
    dataset = prepare(config.data, print)
    config = replace(config, data=from_anywhere(config.data))
    check_vocabulary(config, dataset.vocab_size)
    if not options.resume:
        config = replace(config, model=checked_weights(config.model, lambda line: None))
    with joined_ranks(config.plan) as ranks:
        check_same_everywhere(config, dataset, ranks)
        folder = _agreed_folder(config, options, dataset, ranks)
        lock = _take(folder, ranks)  # noqa: F841 (held until the process ends)
        trainer = Trainer(config, ranks, folder, dataset, ranks.agree(secrets.token_hex(4)))
        ending: Ending = "failed"
        message = ""
        try:
            trainer.run()
            ending = "finished"
        except KeyboardInterrupt:
            ending = "stopped"
            raise
        except Exception as error:
            message = str(error)
            raise
        finally:
            trainer.observer.close(ending, message)


def check_same_everywhere(config: RunConfig, dataset: Dataset, ranks: Ranks) -> None:
    """Refuses ranks that read another config or other data than rank 0, as nodes with files of their own may."""
    own = digest(dataset.fingerprint, dump_config(config))
    if ranks.largest(int(ranks.agree(own) != own)):
        raise ValueError(
            "the ranks have different configs or different data (data.sources); put the config and the data where all "
            "machines see the same files, with the same version of Python for stdlib"
        )


def _agreed_folder(config: RunConfig, options: argparse.Namespace, dataset: Dataset, ranks: Ranks) -> RunFolder:
    """The run's folder, made by rank 0 where the run is new."""
    if options.resume:
        return open_run(options.resume)
    made = ""
    if ranks.rank == 0:
        made = str(create_run(config, options.config, options.name, dataset.tokenizer).path.absolute())
    made = ranks.agree(made)
    if not Path(made).is_dir():
        raise ValueError(
            f"{made}: rank {ranks.rank} does not see it; runs/ must be on a file system that all ranks share"
        )
    return RunFolder(Path(made))


def _take(folder: RunFolder, ranks: Ranks) -> FileLock:
    """Keeps every other process from training this run, until this one ends."""
    lock = FileLock(folder.path / ".lock")
    taken = 0
    if ranks.rank == 0:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            taken = 1
    if ranks.largest(taken):
        raise ValueError(f"{folder.path}: another process is training this run; wait for it or stop it")
    return lock
