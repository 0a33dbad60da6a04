"""Old names and phrases that the code and its pages must not take up again, and what to write instead."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    *sorted((ROOT / "luthier").rglob("*.py")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*.*")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile")),
]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
IN_ONE_LINE = {path: re.sub(r"\s+", " ", text) for path, text in TEXTS.items()}

NAMES = {
    "Strangers": "MismatchedPairs",
    "_Circle": "PromptRing",
    "in_turns": "interleaved",
    "Survey": "StepStatistics",
    "Judged": "RolloutTargets",
    "Judge": "ReferenceScorer",
    "Wanted": "FrozenModelSpec",
    "asks_reference": "frozen_models",
    "companions": "frozen models",
    "Companion": "FrozenModelSpec",
    "OtherModel": "FrozenModelSpec",
    "PolicyAtStart": "FrozenModelSpec",
    "load_other": "load_separate_models",
    "add_companions": "make_parts",
    "add_reference_of": "make_parts",
    "add_rollouts": "make_parts",
    "twin": "duplicate",
    "twins": "duplicates",
    "Terms": "CheckContext",
    "open_packed": "prepare_prequantized",
    "stay_unpacked": "mark_dequantized",
    "surgery": "features",
    "ChatProgram": "ModelChatTemplate",
    "own_template": "template_slots",
    "Whole": "TextWithSpans",
    "parted": "encode_spans",
    "thought_words": "thinking_tags",
    "OwnDraws": "PerAnswerSampler",
    "draws_apart": "samples_apart",
    "cache_room": "eviction",
    "grave": "tombstone",
    "_lack": "reason_against",
    "lack_of": "unavailable",
    "_told": "as_problems",
    "what_became": "resolved_settings",
    "how_to_go_on": "resume_hint",
    "go_on": "resume_pissa",
    "become_routed": "add_routers",
    "lay_out": "place_experts",
    "bring_in": "import_unsloth",
    "keep_as_loaded": "prevent_repacking",
    "multiply_unpacked": "use_dequantized_matmul",
    "put_beside": "attach_unmerged",
    "Halves": "ChosenRejected",
    "built_on": "requires_optim",
    "no_less": "at_least",
    "unsharded": "requires_whole_weights",
    "permitted": "permission_errors",
    "at_hand": "local_path",
    "hush_libraries": "silence_libraries",
    "num_words": "vocab_size",
}
"""Old identifier -> the one that took its place. As parts of longer names, these are allowed.

Ordinary English words (`alone`, `real`, `joined`, `drawn`, `fitting`, `lacks`, `Several`) are not in this list.
"""

PHRASES = {
    r"it is said": "a log line says so",
    r"looks at rows": "inspecting rows",
    r"gone on with": "continued",
    r"learned from \d+ tokens": "trained at N tokens/s",
    r"[Pp]roducts? in 8 bits": "FP8 training",
    r"asked for and": "requested but",
    r"told its own": "receives only its own",
    r"Tried here": "Tested",
    r"may tip": "the sampled token can differ",
    r"reports? of a fault": "a bug report",
    r"those who carry on": "contributors",
    r"\blest\b": "so that ... not",
    r"\bmend(s|ed)?\b": "fix",
    r"for want of": "because no ... was available",
    r"(?:not to|cannot|could not|can) be had": "unavailable",
    r"\b[Ff]ilms?\b": "videos",
    r"\b[Pp]ictures?\b": "images",
    r"\b[Ss]ounds\b": "audio",
    r"\b[Ss]trangers?\b": "mismatched pairs",
    r"\b[Tt]wins?\b": "duplicates",
    r"behind (?:one another|another)": "concatenated without padding",
    r"\bgo(?:es)? before (?:it|them)\b": "takes precedence",
    r"hands? through": "is the identity at first",
    r"\bthat is said\b": "a log line says so",
    r"\bwrites words\b": "is a language model without a reward head",
    r"Which preference loss": "Loss on preference pairs; equations in docs/methods.md.",
    r"What the model learns from": "Training method.",
    r"[Ww]hat learns\b": "trainable parameters",
    r"[Ww]hich weights learn": "which parameters are trained",
    r"(?:weights of|layers of) (?:few|fewer) bits": "low-bit weights",
    r"in the midst": "during",
    r"\bshared? out\b": "shards",
    r"\banew\b": "again, from scratch",
    r"\bis born\b": "is made",
    r"\b(?:go|goes|going|gone|went) on (?:from|with)\b": "resume, continue",
}
"""Old phrase, as a regular expression -> what to write."""


@pytest.mark.parametrize("name", NAMES)
def test_old_names_stay_gone(name):
    found = [path for path, text in TEXTS.items() if re.search(rf"\b{name}\b", text)]
    assert not found, f"write {NAMES[name]} instead of {name}"


@pytest.mark.parametrize("phrase", PHRASES)
def test_old_phrases_stay_gone(phrase):
    found = [path for path, text in IN_ONE_LINE.items() if re.search(phrase, text)]
    assert not found, f"write {PHRASES[phrase]!r}"
