"""The programs llamafactory and trl of PyPI, each in an environment of its own; see `benchmarks/bench_peers.py`."""
