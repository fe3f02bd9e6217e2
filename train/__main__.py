"""One rank of a run: `torchrun ... -m armillary.train CONFIG`, or `-m armillary.train --resume RUN`."""

import argparse
import ctypes
import os
import signal
import sys

from armillary.train.failure import ERRORS_FOLDER, guarded, leave, make_streams_safe


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m armillary.train", description=__doc__)
    parser.add_argument("config", nargs="?", help="a TOML file; see configs/")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--plan", default="", help='short for plan.*, for example "dp=4"')
    parser.add_argument("--name", default="", help="name of the new run's folder in runs/")
    parser.add_argument("--resume", default="", metavar="RUN", help="continue this run from its newest checkpoint")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    if bool(options.config) == bool(options.resume):
        parser.error("give either a CONFIG or --resume RUN")
    return options


def _end_with_parent() -> None:
    """Asks Linux to end this rank when the process that started it is killed, so that none is left behind."""
    if sys.platform == "linux" and ERRORS_FOLDER in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main() -> int:
    make_streams_safe()
    return run_as_rank(parse_arguments(sys.argv[1:]))


def run_as_rank(options: argparse.Namespace) -> int:
    """Trains as one of the ranks that torchrun, or a lab, has started; returns the exit code."""
    _end_with_parent()

    def run() -> None:
        from armillary.train.rank import run_rank

        run_rank(options)

    return guarded(run, options.debug)


if __name__ == "__main__":
    leave(main())
