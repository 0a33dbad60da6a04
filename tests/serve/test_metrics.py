"""The counts in Prometheus' text format."""

from luthier.serve.admission import Admission
from luthier.serve.metrics import Histogram, Metrics


def test_every_line_is_a_comment_or_a_number():
    metrics, admission = Metrics(), Admission(2, 5)
    admission.enter(3)
    metrics.requests["/v1/models", 200] += 2
    metrics.seconds.observe(0.3)
    text = metrics.text(admission, is_ready=True)
    values = {}
    for line in text.splitlines():
        if not line.startswith(("# HELP ", "# TYPE ")):
            name, value = line.rsplit(" ", 1)
            values[name] = float(value)
    assert values["luthier_requests_running"] == 2
    assert values["luthier_requests_waiting"] == 1
    assert values['luthier_requests_total{route="/v1/models",status="200"}'] == 2
    assert values['luthier_request_seconds_bucket{le="0.25"}'] == 0
    assert values['luthier_request_seconds_bucket{le="0.5"}'] == 1
    assert text.endswith("\n")


def test_a_histogram_adds_up():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert (histogram.counts, histogram.count, histogram.sum) == ([2, 3], 4, 12.0)
