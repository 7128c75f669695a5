import io
import logging
import re
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from simgr_jax.training import progress_line
from simgr_jax.training.progress_line import SECONDS, ProgressLine, duration


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Scalar:
    """A scalar that the device has computed or not."""

    def __init__(self, value, ready=True):
        self.value, self.ready = value, ready

    def is_ready(self):
        return self.ready

    def __float__(self):
        assert self.ready, "waits for the device"
        return float(self.value)

    __int__ = lambda self: int(float(self))  # noqa: E731


def step(loss=2.5, targets=100, ready=True):
    return {"loss": Scalar(loss, ready), "targets": Scalar(targets, ready)}


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def line(clock):
    """Shows a run of 4 epochs of 10 steps; only the tests look at it."""
    line = ProgressLine(clock)
    line.begin(0, 40, 10, 10)
    return line


def printed(capsys):
    return capsys.readouterr().out.splitlines()


def test_a_line_has_step_epoch_loss_speed_and_the_time_left(line, clock, capsys):
    for number, loss in ((1, 3.0), (2, 2.0)):
        clock.now += 4
        line.started(number, step(loss))
    line.show()
    clock.now += 40
    for number in range(3, 13):
        line.started(number, step(1.25, 200))
    line.show()
    line.show()
    assert printed(capsys) == [
        "step 2/40  epoch 1/4  loss 2.5  25 targets/s  3 min left",
        "step 12/40  epoch 2/4  loss 1.25  50 targets/s  2 min left",
    ]


def test_the_time_left_counts_the_validations_to_come_and_no_time_before_the_first_step(line, clock):
    clock.now += 1000  # Compiling.
    line.begin(5, 40, 10, 10)
    for number in range(6, 11):
        clock.now += 2
        line.started(number, step())
    line.show()
    assert line.seconds_left() == pytest.approx(30 * 2)
    with line.doing("validating"):
        clock.now += 7
    line.validated(10, {"NDCG@10": 0.125})
    assert line.seconds_left() == pytest.approx(30 * 2 + 3 * 7)
    for number in range(11, 16):
        clock.now += 4
        line.started(number, step())
    line.show()
    assert line.seconds_left() == pytest.approx(25 * 3 + 3 * 7)


def test_the_speed_is_that_of_the_steps_alone(line, clock, capsys):
    with line.doing("validating"):
        clock.now += 20
    clock.now += 2
    line.started(1, step(targets=100))
    line.show()
    assert "  50 targets/s  " in printed(capsys)[0]


def test_there_is_a_line_every_thirty_seconds_however_rarely_the_loop_shows_one(line, clock, capsys):
    """Steps of 7 seconds, looked at every second."""
    times = []
    for second in range(1, 301):
        clock.now += 1
        if second % 7 == 0:
            line.started(second // 7, step())
        line.look()
        times += [second] * len(printed(capsys))
    assert times[0] == 7
    assert np.diff(times).max() <= 30
    assert len(times) <= 300 / SECONDS + 1


def test_a_step_that_has_not_ended_is_not_waited_for(line, clock, capsys):
    line.started(1, step())
    line.started(2, slow := step(ready=False))
    line.look()
    assert [text.partition("  loss")[0] for text in printed(capsys)] == ["step 1/40  epoch 1/4"]
    clock.now += 45
    line.look()
    assert printed(capsys) == ["step 2/40: 45 s so far  29 min left"]
    for scalar in slow.values():
        scalar.ready = True
    clock.now += 31
    line.look()
    assert printed(capsys)[0].startswith("step 2/40  epoch 1/4  loss 2.5  1 targets/s")


def test_what_else_takes_long_is_said_again_and_again(line, clock, capsys):
    with line.doing("validating"):
        for _ in range(70):
            clock.now += 1
            line.look()
    assert printed(capsys) == ["validating: 28 s so far", "validating: 56 s so far"]
    with line.doing("validating"):
        clock.now += 13
        line.look()
        assert printed(capsys) == []
        clock.now += 1
        line.look()
    assert printed(capsys) == ["validating: 14 s so far"]


def test_what_a_run_prepares_is_said_before_its_first_step(clock, capsys):
    line = ProgressLine(clock)
    with line.doing("preparing the model"):
        clock.now += 20
        line.look()
    clock.now += 10
    line.look()
    with line.doing("compiling the training step"):
        for _ in range(40):
            clock.now += 1
            line.look()
    assert printed(capsys) == ["preparing: 10 s so far", "compiling the training step: 28 s so far"]


def test_the_time_left_is_said_while_validating_and_does_not_count_it_as_steps(line, clock, capsys):
    clock.now += 10
    line.started(1, step())
    line.show()
    with line.doing("validating"):
        clock.now += 100
        line.look()
    assert printed(capsys)[1] == "validating: 2 min so far  6 min left"


def test_a_loss_that_is_not_finite_is_left_out_of_the_mean(line, clock, capsys):
    clock.now += 1
    line.started(1, step(np.nan, 100))
    line.started(2, step(2.0, 50))
    line.show()
    line.started(3, step(np.inf, 50))
    clock.now += 1
    line.show()
    first, second = printed(capsys)
    assert "loss 2  50 targets/s" in first
    assert "loss not finite  0 targets/s" in second


def test_the_metrics_of_a_validation_are_a_line(line, capsys):
    line.validated(20, {"NDCG@10": 0.125, "coverage@10": 0.5})
    assert printed(capsys) == ["step 20/40  epoch 2/4  validation/NDCG@10 0.125  validation/coverage@10 0.5"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (5400, "1.5 h"), (86400, "24.0 h")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


@contextmanager
def looked_at(line, monkeypatch):
    monkeypatch.setattr(progress_line, "_SECONDS_BETWEEN_LOOKS", 0.01)
    with line:
        yield
    assert not [thread.name for thread in threading.enumerate() if thread.name == "progress line"]


def test_a_thread_looks_by_itself_and_ends(line, capsys, monkeypatch):
    with looked_at(line, monkeypatch):
        line.started(1, step())
        deadline = time.monotonic() + 30
        while not (out := capsys.readouterr().out) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert re.fullmatch(r"step 1/40  epoch 1/4  loss 2\.5  .* left\n", out)


def test_only_the_main_process_prints(line, clock, capsys, monkeypatch):
    monkeypatch.setattr(progress_line.distributed, "is_main", lambda: False)
    with looked_at(line, monkeypatch):
        clock.now += 100
        line.started(1, step())
        line.show()
        line.say("anything")
    assert capsys.readouterr().out == ""


def test_progress_that_can_not_be_printed_never_stops_training(line, monkeypatch, caplog):
    with open("/dev/full", "w") as full, caplog.at_level(logging.WARNING):
        monkeypatch.setattr(sys, "stdout", full)
        with line:
            line.say("first")
            line.say("second")
        assert sys.stdout is full
    assert caplog.messages == [
        "standard output: can't be written (No space left on device); what is printed from here on is lost"
    ]


def test_a_terminal_shows_a_bar(line, clock, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress_line, "Console", lambda: Console(file=screen, force_terminal=True, width=120))
    with line:
        line.begin(4, 40, 10, 10)
        clock.now += 1
        line.started(5, step(targets=12346))
        line.show()
        line.validated(10, {"NDCG@10": 0.125})
    shown = Text.from_ansi(screen.getvalue()).plain
    assert "validation/NDCG@10 0.125" in shown
    assert " 5/40" in shown
    assert "loss 2.5  12,346 targets/s" in shown
    assert "━" in shown
