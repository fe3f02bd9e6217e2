"""How a failing rank tells why: one sentence for the person, the traceback for --debug. Imports no torch."""

import errno
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from armillary.train.files import write_json

ERRORS_FOLDER = "ARMILLARY_ERRORS"
"""Environment variable: the folder in which ranks leave their failures for the process that started them."""

SECONDS_FOR_THE_FIRST = 5

REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space, then try again (what was saved before is kept)",
    errno.EROFS: "the file system is read-only; choose a folder that can be written",
    errno.EACCES: "this user may not do that; choose another folder, or change its permissions",
}

REFUSED, FAILED = 2, 1
"""Exit codes: an input that was refused; a failure."""


class RunStopped(Exception):
    """A run that cannot go on, for a reason that a person can understand and act on."""


@dataclass(frozen=True)
class Failure:
    """Why one rank ended. A `bug` is ours, all else is told without a traceback; `follows` that of another rank."""

    rank: int
    message: str
    traceback: str
    exit_code: int
    bug: bool
    time: float
    follows: bool = False


def describe(error: BaseException, rank: int = 0) -> Failure:
    """The failure that an exception stands for: ValueError and OSError are refused input, RunStopped a failed run."""
    # torch adds the frames of its C++ code; --debug shows them.
    text = str(error).split("\nException raised from ")[0] or type(error).__name__
    if isinstance(error, OSError) and error.errno in REMEDIES:
        text = f"{text}: {REMEDIES[error.errno]}"
    bug = not isinstance(error, (ValueError, OSError, RunStopped))
    follows = bug and re.search("Connection (closed|reset) by peer|Broken pipe", text) is not None
    if follows:
        bug, text = False, f"rank {rank} lost its connection to another rank, which failed first: {text}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        remedy = "Raise optim.micro_batches or plan.dp, or lower data.batch_size or the sizes in [model]."
        bug, text = False, f"rank {rank} is out of memory: {text}\n{remedy}"
    return Failure(
        rank=rank,
        message=f"{type(error).__name__}: {text}" if bug else text,
        traceback="".join(traceback.format_exception(error)),
        exit_code=REFUSED if isinstance(error, (ValueError, OSError)) else FAILED,
        bug=bug,
        time=time.time(),
        follows=follows,
    )


def show(failure: Failure, debug: bool) -> None:
    """Prints a failure to standard error."""
    if debug and failure.traceback:
        print(failure.traceback, file=sys.stderr)
    print(f"error: {failure.message}", file=sys.stderr)
    if failure.bug and not debug:
        print("This is not your mistake. Add --debug to see the traceback, and please report it.", file=sys.stderr)


def make_streams_safe() -> None:
    """Lets a process print whatever it is and however it was started.

    One that was started with closed streams (`>&-`, as some daemons do) gets empty ones: Python has None in their
    place, and the next file or socket would get their number. Letters that the locale does not know become "?".
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, mode, errors="replace")  # noqa: SIM115 (as long as the process)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def say(text: str) -> None:
    """Prints a line, or nothing where nobody listens any more (`| head`): no reason to stop a run."""
    with suppress(OSError):
        print(text, flush=True)


def leave(exit_code: int) -> NoReturn:
    """Ends this process at once, with all output written.

    The usual way out may abort: a worker thread of gloo that lets go of a tensor while Python shuts down is ended by
    Python in the middle of C++ code that forbids it ("terminate called without an active exception", seen in 1 of 10
    exits). By now every file is closed and every group left, so there is nothing to miss.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # whoever read it may be gone
            stream.flush()
    os._exit(exit_code)


def guarded(main: Callable[[], None], debug: bool) -> int:
    """Runs a rank's main; tells its failure to whoever started the ranks; returns the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        main()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        failure = describe(error, rank)
        if not _left_for_launcher(failure):
            if failure.follows or (rank != 0 and not failure.bug):
                # All ranks refuse the same input, and those that lost a neighbour only follow it. The first to leave
                # makes torchrun end the others, so that the right one speaks, once; what only this rank found it says
                # itself after a while.
                time.sleep(SECONDS_FOR_THE_FIRST)
            show(failure, debug)
        return failure.exit_code
    return 0


def _left_for_launcher(failure: Failure) -> bool:
    """Whether whoever started the ranks can read this failure and will tell it."""
    folder = os.environ.get(ERRORS_FOLDER)
    if not folder:
        return False
    try:
        write_json(Path(folder, f"rank-{failure.rank}.json"), asdict(failure))
    except OSError:  # the failure may be that the disk is full
        return False
    return True
