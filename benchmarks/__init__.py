"""The programs behind the figures in docs/benchmarks.md. Run them from the root of the repository."""
