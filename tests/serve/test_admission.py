"""Requests beyond the queue are refused, and all of them once the server stops."""

import pytest

from luthier.serve.admission import Admission
from luthier.serve.errors import ApiError


def test_running_and_waiting():
    admission = Admission(2, 1)
    admission.enter(3)
    assert (admission.num_running, admission.num_waiting) == (2, 1)
    with pytest.raises(ApiError):
        admission.check()
    with pytest.raises(ApiError) as caught:
        admission.enter(1)
    assert (caught.value.status, caught.value.code) == (503, "server_overloaded")
    assert caught.value.headers["Retry-After"] == "1"
    admission.leave()
    admission.enter(1)


def test_many_answers_of_one_request_are_let_in_together():
    admission = Admission(2, 0)
    admission.enter(5)
    assert admission.num_waiting == 3


def test_no_queue_still_lets_running_ones_in():
    admission = Admission(1, 0)
    admission.enter(1)
    with pytest.raises(ApiError):
        admission.enter(1)


def test_stopping():
    admission = Admission(1, 1)
    admission.is_stopping = True
    with pytest.raises(ApiError) as caught:
        admission.enter(1)
    assert caught.value.status == 503
