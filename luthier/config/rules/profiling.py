"""Rules about the keys of the PyTorch profiler."""

from luthier.config.rules.engine import Rules, at_least

PROFILER_RULES = Rules(
    (
        at_least("profiler", "profiler_wait_steps", 0),
        at_least("profiler", "profiler_warmup_steps", 0),
        at_least("profiler", "profiler_active_steps", 1),
        at_least("profiler", "profiler_repeat", 0),
    )
)
