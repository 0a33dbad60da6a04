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
