import signal
import threading

import pytest

from luthier.core.threads import in_own_thread


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
