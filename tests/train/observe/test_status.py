"""The status line: fits its width, tells the time left, stays plain without a terminal, and never harms the run."""

import io
import os
import pty
import re
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.train.observe.status import NullStatus, Status, status_line
from armillary.train.words import duration, quantity

anything = st.floats(allow_nan=True, allow_infinity=True)
counts = st.integers(0, 10**7)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def train(status: Status, clock: Clock, steps: Iterator[int] | range, seconds: float) -> None:
    for step in steps:
        clock.now += seconds
        status.update(step, 8.0 / step, 4532.0, 0.412, 1.23)


@given(counts, counts, anything, anything, st.none() | anything, st.none() | st.floats(0, 1e6), st.integers(20, 200))
def test_line_is_never_wider_than_asked(
    step: int, total: int, loss: float, rate: float, eval_loss: float | None, memory: float | None, width: int
) -> None:
    line = status_line(
        step, total, loss=loss, tokens_per_sec=rate, mfu=0.5, memory_gib=memory, eval_loss=eval_loss, width=width
    )
    assert len(line) <= width
    assert line.startswith(f"step {step}/{total}"[:width])


def test_usual_line_holds_everything_in_80_columns() -> None:
    line = status_line(
        19999,
        20000,
        loss=10.1234,
        tokens_per_sec=45_321,
        mfu=0.412,
        memory_gib=71.2,
        eval_loss=3.5,
        remaining="ETA 59:59",
    )
    assert line == "step 19999/20000  loss 10.123  eval 3.500  45.3k tok/s  MFU 41%  ETA 59:59"
    short = status_line(12, 300, loss=3.1, tokens_per_sec=4532, mfu=0.4, memory_gib=0.61, eval_loss=8.3)
    assert short == "step 12/300  loss 3.100  eval 8.300  4,532 tok/s  MFU 40%  0.6 GiB  ETA -"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1h 00m"), (86399, "23h 59m"), (180000, "2d 02h")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0"),
        (940.4, "940"),
        (9999.4, "9,999"),
        (9999.6, "10k"),
        (999_499, "999k"),
        (999_500, "1M"),
        (2.5e15, "2.5P"),
    ],
)
def test_quantity(number: float, words: str) -> None:
    assert quantity(number) == words


@given(anything)
def test_quantity_is_short_for_any_number(number: float) -> None:
    assert len(quantity(number)) <= 9


def test_without_a_terminal_plain_lines_come_at_a_sane_rate() -> None:
    stream, clock = io.StringIO(), Clock()
    status = Status(1000, stream, clock)
    train(status, clock, range(1, 1001), 0.1)
    status.close()
    lines = stream.getvalue().splitlines()
    # 100 seconds: the first, one every ten seconds, the last.
    assert 10 <= len(lines) <= 12
    assert lines[0].startswith("step 1/1000")
    assert lines[-1].startswith("step 1000/1000")
    assert "took 1:40" in lines[-1]
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_slow_steps_print_at_least_a_line_a_minute_and_fast_runs_two() -> None:
    stream, clock = io.StringIO(), Clock()
    train(Status(100_000, stream, clock), clock, range(1, 11), 61)
    assert len(stream.getvalue().splitlines()) == 10
    stream = io.StringIO()
    train(Status(200, stream, clock), clock, range(1, 201), 0.01)
    assert len(stream.getvalue().splitlines()) == 2


def test_time_left_is_that_of_the_usual_step_whatever_one_evaluation_took() -> None:
    stream, clock = io.StringIO(), Clock()
    status = Status(100, stream, clock)
    train(status, clock, range(1, 10), 2)
    clock.now += 500
    status.evaluated(3.25)
    train(status, clock, range(10, 11), 2)
    last = stream.getvalue().splitlines()[-1]
    assert last.startswith("step 10/100")
    assert "eval 3.250" in last
    assert last.endswith("ETA 3:00")


def test_time_left_after_a_roll_back_and_from_a_resumed_step() -> None:
    stream, clock = io.StringIO(), Clock()
    train(Status(100, stream, clock), clock, iter([41, 31]), 70)
    assert stream.getvalue().splitlines()[-1].endswith("ETA -")
    train(Status(100, stream, clock), clock, iter([41, 42, 43, 31, 32, 32]), 70)
    assert [line.split("ETA ")[1] for line in stream.getvalue().splitlines()][-1] == duration(68 * 70)


def test_a_run_cut_short_leaves_its_last_line() -> None:
    stream, clock = io.StringIO(), Clock()
    status = Status(1000, stream, clock)
    train(status, clock, range(1, 8), 0.1)
    status.close()
    assert stream.getvalue().splitlines()[-1].startswith("step 7/1000")
    silent = io.StringIO()
    Status(10, silent, clock).close()
    assert silent.getvalue() == ""


def test_notes_are_cleaned_of_what_steers_a_terminal() -> None:
    stream = io.StringIO()
    Status(10, stream).note("[bold]def f():\n\tpass\x1b[2J\r\x07 é")
    assert stream.getvalue() == "[bold]def f():\n\tpass\ufffd[2J\ufffd\ufffd é\n"


def test_stream_that_cannot_encode_shows_what_it_can() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Status(10, stream).note("é →")
    assert raw.getvalue() == b"? ?\n"


def test_stream_that_is_gone_does_not_stop_the_run() -> None:
    read, write = os.pipe()
    os.close(read)
    pipe, closed = os.fdopen(write, "w", buffering=1), io.StringIO()
    statuses = [Status(10, stream) for stream in (pipe, closed)]
    closed.close()
    for status in statuses:
        status.note("nobody listens")
        status.update(1, 2.0, 3.0)
        status.close()
    with suppress(OSError):
        pipe.close()


def test_silent_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    status = NullStatus()
    status.update(1, 2.0, 3.0)
    status.evaluated(1.0)
    status.note("x")
    status.close()
    assert capsys.readouterr() == ("", "")


def on_terminal(kind: str) -> str:
    """What a run of 30 steps writes to a terminal of 80 columns."""
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(TERM=kind, COLUMNS="80")
        os.environ.pop("NO_COLOR", None)
        clock = Clock()
        status = Status(30, sys.__stdout__, clock)
        train(status, clock, range(1, 16), 1)
        status.note("saved [checkpoint] step-15")
        train(status, clock, range(16, 31), 1)
        status.close()
        sys.__stdout__.flush()  # type: ignore[union-attr]
        os._exit(0)
    output = b""
    try:
        while chunk := os.read(terminal, 65536):
            output += chunk
    except OSError:
        pass
    assert os.waitpid(process, 0)[1] == 0
    os.close(terminal)
    return output.decode()


def test_on_a_terminal_the_line_stays_in_place() -> None:
    output = on_terminal("xterm-256color")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    assert "saved [checkpoint] step-15\r\n" in text
    # Steps overwrite each other: new lines come from the note and the end alone.
    assert text.count("\n") <= 4
    assert text.count("step ") >= 30
    assert text.rstrip().endswith("took 0:30")
    # The cursor is shown at once, so that a run that is killed leaves it there.
    assert output.rindex("\x1b[?25l") < output.index("\x1b[?25h") < output.index("loss")


def test_on_a_dumb_terminal_lines_are_plain() -> None:
    assert "\x1b" not in on_terminal("dumb")
