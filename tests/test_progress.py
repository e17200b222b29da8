"""Progress is one line rewritten in place on a terminal, and two plain lines anywhere else."""

import io
import os
import pty

import pytest

from cluster.progress import ProgressLine, duration, format_line


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_line_shows_step_fields_rate_and_time_left():
    clock, out = Clock(), Terminal()
    line = ProgressLine(400, "distill", out, clock=clock)
    clock.now += 30
    line.update(100, units=12800, loss=0.123456, live_heads=160, refreshes=4)
    assert line.text() == (
        "distill [####            ] 100/400  loss 0.1235  live heads 160  refreshes 4  samples/s 426.7"
        "  0:30 spent  1:30 left"
    )
    assert out.getvalue() == "\r" + line.text()


def test_time_left_of_a_resumed_run_counts_only_its_own_steps():
    text = format_line("train", 300, 500, 50.0, {}, start=200)
    assert text.endswith("0:50 spent  1:40 left")
    assert format_line("train", 200, 500, 3.0, {}, start=200).endswith("-:-- left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (90061, "25:01:01"),
        (float("nan"), "-:--"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_terminal_line_is_rewritten_at_most_five_times_a_second_and_always_at_the_end():
    clock, out = Clock(), Terminal()
    with ProgressLine(1000, "train", out, clock=clock) as line:
        for step in range(1, 1001):
            clock.now += 0.001
            line.update(step)
    shown = out.getvalue().split("\r")[1:]
    assert 5 <= len(shown) <= 8
    assert "1000/1000" in shown[-1]
    assert shown[-1].endswith("done\n")
    assert out.getvalue().count("\n") == 1


def test_shorter_line_wipes_the_longer_one_before_it():
    clock, out = Clock(), Terminal()
    line = ProgressLine(10, "train", out, clock=clock)
    line.update(1, note="a long note about nothing")
    clock.now += 1
    line.update(2, note="x")
    first, second = out.getvalue().split("\r")[1:]
    assert len(second) >= len(first)
    assert second.rstrip() == line.text()


def test_no_terminal_gets_a_start_line_and_an_end_line_only():
    clock, out = Clock(), io.StringIO()
    with ProgressLine(10, "train", out, start=2, clock=clock) as line:
        for step in range(3, 11):
            clock.now += 60
            line.update(step, loss=1.0)
        assert out.getvalue() == "train: 8 of 10 steps to go\n"
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("train [################] 10/10  loss 1  8:00 spent")
    assert "\r" not in out.getvalue()


def test_end_line_names_the_exception_and_is_written_once():
    out = io.StringIO()
    line = ProgressLine(10, "train", out)
    with pytest.raises(KeyboardInterrupt), line:
        raise KeyboardInterrupt
    line.close()
    assert out.getvalue().splitlines()[1:] == [f"{line.text()}  stopped by KeyboardInterrupt"]


def test_real_terminal_never_gets_a_line_that_wraps():
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        columns = os.get_terminal_size(stream.fileno()).columns or 20
        line = ProgressLine(10, "train", stream)
        assert line.live
        line.update(1, note="n" * 500)
        written = os.read(ours, 4096).decode()
    os.close(ours)
    assert written.startswith("\rtrain [")
    assert len(written) - 1 < max(columns, 20)


def test_nothing_to_do_is_refused():
    with pytest.raises(ValueError, match="train: total=0"):
        ProgressLine(0, "train", io.StringIO())
