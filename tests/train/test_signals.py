"""Which signals ask work to stop."""

import os
import pty
import signal

import pytest

from minilora.train.signals import Stopped, StopRequest


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_remembered_and_followed_and_what_was_heard_is_put_back(signum: int) -> None:
    inherited = signal.signal(signum, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signum)
            assert stop.signum == signum
            with pytest.raises(Stopped, match="saved") as stopped:
                stop.follow("saved")
        assert stopped.value.exit_status == 128 + signum
        assert signal.getsignal(signum) == signal.SIG_DFL
    finally:
        signal.signal(signum, inherited)


def test_a_second_signal_is_not_put_off_whatever_the_first_was() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_cursor_is_there_again() -> None:
    """A bar has hidden it, and the next signal may leave nobody to show it."""
    ours, theirs = pty.openpty()
    saved = os.dup(1)
    os.dup2(theirs, 1)
    try:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGINT)
            assert os.read(ours, 100) == b"\x1b[?25h"
    finally:
        for end in (ours, theirs):
            os.close(end)
        os.dup2(saved, 1)
        os.close(saved)


def test_a_closed_terminal_stops_nothing_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signum is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
