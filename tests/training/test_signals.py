"""Signals that end a run: which are taken, what each does, and that all is as before afterwards."""

import os
import signal
import threading

import pytest

from qdense.training.signals import StopSignals, named

TAKEN = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def ordinary_signals():
    """As in a terminal; under nohup or in a shell's background some are ignored."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in TAKEN}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", TAKEN)
def test_the_first_is_a_request_and_the_second_leaves_at_once(number):
    told = threading.Event()
    notices = []

    def emit(event):
        notices.append((event.level, event.text))
        told.set()

    with StopSignals(emit) as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received is number
        assert told.wait(10)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert signals.received is number
    assert notices == [
        ("warning", f"{named(number)}: stopping after this step, with a checkpoint; a second one stops at once")
    ]
    assert {signal.getsignal(each) for each in TAKEN} == {signal.default_int_handler}


def test_a_display_that_hangs_holds_up_nobody():
    """It is reported in a thread that ends with the process."""
    threads, release = [], threading.Event()

    def emit(event):
        threads.append(threading.current_thread())
        release.wait(10)

    with StopSignals(emit) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received is signal.SIGTERM
        while not threads:
            pass
        assert threads[0] is not threading.main_thread()
        assert threads[0].daemon
    release.set()


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals(lambda event: None) as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_outside_the_main_thread_nothing_is_taken():
    found = []

    def enter():
        with StopSignals(lambda event: None):
            found.append({signal.getsignal(each) for each in TAKEN})

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [{signal.default_int_handler}]
