"""Rules about generating answers, for the commands that render conversations."""

from luthier.config.rules.engine import (
    Rule,
    Rules,
    above,
    all_of,
    at_least,
    in_training,
    is_changed,
    warning,
    within,
)
from luthier.core.kinds import TOOL_SYNTAXES

MOST_BEAMS = 10_000
"""Each of them is a row of the cache."""

GENERATING_RULES = Rules(
    (
        at_least("generating", "temperature", 0),
        within("generating", "top_p", 0, 1, or_high=True),
        at_least("generating", "top_k", 0),
        within("generating", "num_beams", 1, MOST_BEAMS, or_high=True),
        above("generating", "repetition_penalty", 0),
        *in_training(
            within("data", "eval_num_beams", 0, MOST_BEAMS, or_high=True),
            within("training", "generation_num_beams", 0, MOST_BEAMS, or_high=True),
        ),
        Rule(
            ("max_new_tokens", "max_length"),
            "leaves no room for an answer, together with max_length",
            "set one of them above 0",
            lambda run: run.generating.max_new_tokens <= 0 and run.generating.max_length <= 0,
        ),
        warning(
            ("max_length", "max_new_tokens"),
            "is not read, since max_new_tokens says how long an answer may be",
            "leave it out; how long rows may be is cutoff_len",
            all_of(is_changed("max_length"), lambda run: run.generating.max_new_tokens > 0),
        ),
        Rule(
            ("tool_format",),
            "no tool syntax has this name",
            "leave it out to use the syntax of the template",
            lambda run: run.data.tool_format is not None and run.data.tool_format not in TOOL_SYNTAXES.names,
        ),
    )
)
