"""The words of the field: old names and phrases that the code and its pages must not take up again."""

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

NAMES = {
    "Strangers": "MismatchedPairs",
    "_Circle": "PromptRing",
    "in_turns": "interleaved",
    "Terms": "CheckContext",
    "open_packed": "prepare_prequantized",
    "stay_unpacked": "mark_dequantized",
    "ChatProgram": "ModelChatTemplate",
    "own_template": "template_slots",
    "thought_words": "thinking_tags",
    "OwnDraws": "PerAnswerSampler",
    "draws_apart": "samples_apart",
    "cache_room": "eviction",
    "_lack": "reason_against",
    "lack_of": "unavailable",
    "what_became": "resolved_settings",
    "how_to_go_on": "resume_hint",
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
    "at_hand": "local_path",
    "hush_libraries": "silence_libraries",
    "num_words": "vocab_size",
    "surgery": "features",
}
"""Old identifier -> the one that took its place."""

PHRASES = {
    r"only looks at rows": "inspecting rows",
    r"gone on with": "continued",
    r"learned from \d+ tokens": "trained at N tokens/s",
    r"Products in 8 bits": "FP8 training",
    r"keeps? apart rows": "does not attend across samples",
    r"is told its own": "receives only its own",
    r"Tried here": "Tested",
    r"(?:may|a draw) tips?\b": "the sampled token can differ",
    r"reports? of a fault": "a bug report",
    r"[Ff]or those who carry on": "for contributors",
    r"\blest\b": "so that ... not",
    r"\bmade anew\b": "rebuilt",
    r"not to be had": "unavailable",
}
"""Old phrase, as a regular expression -> what to write."""


@pytest.mark.parametrize("name", NAMES)
def test_old_names_stay_gone(name):
    found = [path for path, text in TEXTS.items() if re.search(rf"\b{name}\b", text)]
    assert not found, f"write {NAMES[name]} instead of {name}"


@pytest.mark.parametrize("phrase", PHRASES)
def test_old_phrases_stay_gone(phrase):
    found = [path for path, text in TEXTS.items() if re.search(phrase, re.sub(r"\s+", " ", text))]
    assert not found, f"write {PHRASES[phrase]!r}"
