import signal
import threading
from functools import partial

import pytest

from luthier.core.threads import all_in_threads, in_own_thread


def test_the_thread_ends_with_its_work():
    thread = in_own_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_errors_reach_the_caller():
    with pytest.raises(LookupError, match="not there"):
        in_own_thread(lambda: (_ for _ in ()).throw(LookupError("not there")))


def test_an_interrupt_does_not_wait_for_the_work():
    asked, end, ended = threading.Event(), threading.Event(), []

    def interrupt():
        asked.wait()
        # As Ctrl-C: to the thread that waits. A signal that another thread raises for itself wakes nobody.
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def work():
        asked.set()
        ended.append(end.wait(60))

    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            in_own_thread(work)
        assert not ended
    finally:
        end.set()


def test_several_threads_keep_the_order_and_run_together():
    meet = threading.Barrier(3)

    def work(number):
        meet.wait(60)
        return number

    assert all_in_threads([partial(work, n) for n in range(6)], 3) == list(range(6))
    assert all_in_threads([], 3) == []


def test_a_fault_in_one_of_several_threads_does_not_wait_for_the_others():
    end, begun = threading.Event(), []

    def work(number):
        begun.append(number)
        if number == 1:
            raise LookupError("not there")
        assert end.wait(60)

    try:
        with pytest.raises(LookupError, match="not there"):
            all_in_threads([partial(work, n) for n in range(9)], 2)
    finally:
        end.set()
    assert sorted(begun) == [0, 1] or sorted(begun) == [0, 1, 2]
