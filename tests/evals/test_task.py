"""A record is one line of results.jsonl."""

import json

from luthier.evals.task import Record


def test_a_record_is_read_as_it_was_written():
    record = Record("sums", 3, {"answer": "A", "loglikelihoods": {"A": -0.123456789012345}})
    assert json.dumps(record.as_json()).startswith('{"subject": "sums", "index": 3, "answer": "A"')
    assert Record.of(json.loads(json.dumps(record.as_json()))) == record
