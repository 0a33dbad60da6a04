"""Row plans: targets are tokens of the row, prompts are never truncated, and only their settings decide the rows."""

from dataclasses import replace
from typing import Any

import pytest

from luthier.core.errors import RowError
from luthier.core.kinds import STAGES
from luthier.data.chat.encoder import Encoder
from luthier.data.plans.dialogues import DIALOGUES
from luthier.data.plans.distillation import DISTILLATION
from luthier.data.plans.feedback import FEEDBACK
from luthier.data.plans.pairs import PAIRS
from luthier.data.plans.prompts import PROMPTS
from luthier.data.plans.texts import TEXTS
from luthier.data.rows.encoding import Encoding
from luthier.data.rows.labels import IGNORE_INDEX, Encoded
from luthier.data.rows.row_plan import RowPlan, RowSettings
from luthier.data.rows.tokenize import turn_ids
from luthier.data.templates import get_template
from luthier.data.types import Dialogue, Feedback, Message, Preference, Prompt
from luthier.stages.gkd import GkdConfig
from luthier.stages.sft import SftConfig
from tests import tiny

ASK, ANSWER, MORE, LAST = (
    Message("user", "how high?"),
    Message("assistant", "ten feet"),
    Message("user", "and wide?"),
    Message("assistant", "twenty feet"),
)
TALK = Dialogue((ASK, ANSWER, MORE, LAST))
CASES: list[tuple[RowPlan, Any]] = [
    (TEXTS, Prompt((ASK,))),
    (DIALOGUES, TALK),
    (DISTILLATION, TALK),
    (PAIRS, Preference((ASK,), ANSWER, LAST)),
    (FEEDBACK, Feedback((ASK, ANSWER), liked=True)),
    (PROMPTS, TALK),
]


def encoding(cutoff_len: int | None = None) -> Encoding:
    return Encoding(Encoder(tiny.byte_tokenizer()), get_template("chatml"), cutoff_len)


def rows_of(plan: RowPlan, example: Any, cutoff_len: int | None = None, **settings: bool) -> list[tuple[Encoded, ...]]:
    own, chosen = encoding(cutoff_len), RowSettings(**settings)
    written = plan.write(example, own, chosen)
    return [plan.label(turn_ids(own.encoder, row), own, chosen) for row in written]


@pytest.mark.parametrize(("plan", "example"), CASES, ids=lambda value: getattr(value, "name", ""))
@pytest.mark.parametrize("num_cut", [0, 5])
def test_targets_are_tokens_of_the_row_and_truncation_is_counted(plan, example, num_cut):
    """Each part has a label for every token, the token itself or none; what is kept and lost adds up to the whole."""
    whole = rows_of(plan, example)
    length = max(len(part.input_ids) for row in whole for part in row)
    if num_cut and plan is PROMPTS:
        pytest.skip("prompts are not truncated")
    for row, uncut in zip(rows_of(plan, example, length - num_cut), whole, strict=True):
        assert len(row) == len(plan.parts)
        for part, full in zip(row, uncut, strict=True):
            assert len(part.labels) == len(part.input_ids) <= length - num_cut
            assert all(label in (token, IGNORE_INDEX) for token, label in zip(part.input_ids, part.labels, strict=True))
            assert part.num_tokens == len(full.input_ids)
            assert part.num_labels + part.lost_labels == full.num_labels
    assert not any(part.lost_tokens for row in whole for part in row)


@pytest.mark.parametrize(("plan", "settings"), [(PROMPTS, {}), (DISTILLATION, {"own_answers": True})])
def test_a_prompt_that_the_model_answers_is_never_truncated(plan, settings):
    ((whole,),) = rows_of(plan, TALK, **settings)
    num_prompt = whole.labels.count(IGNORE_INDEX)
    with pytest.raises(RowError, match=r"the prompt .* cutoff_len"):
        rows_of(plan, TALK, num_prompt - 1, **settings)
    ((shorter,),) = rows_of(plan, TALK, num_prompt + 1, **settings)
    assert shorter.input_ids[:num_prompt] == whole.input_ids[:num_prompt]


def test_answers_of_the_student_have_no_weights():
    talk = Dialogue((ASK, replace(ANSWER, loss=0.5)))
    settings = RowSettings(own_answers=True)
    assert DISTILLATION.weigh is not None
    with pytest.raises(RowError, match="gkd_lambda"):
        DISTILLATION.weigh(talk, [], [], encoding(), settings)


def test_pairs_without_a_preference_are_refused():
    for chosen, rejected in ((ANSWER, ANSWER), (replace(ANSWER, content=" "), ANSWER)):
        with pytest.raises(RowError):
            rows_of(PAIRS, Preference((ASK,), chosen, rejected))
    with pytest.raises(RowError, match="the same up to cutoff_len"):
        rows_of(PAIRS, Preference((ASK,), ANSWER, replace(ANSWER, content="ten miles")), 12)


def test_only_keys_that_decide_the_rows_are_settings():
    """All others leave the cache key of the rows as it is."""
    plain = DIALOGUES.settings(SftConfig())
    assert DIALOGUES.settings(SftConfig(use_eaft_loss=True, eaft_alpha=2.0, label_smoothing_factor=0.1)) == plain
    assert (
        DIALOGUES.settings(SftConfig(mask_history=True)) != plain != DIALOGUES.settings(SftConfig(train_on_prompt=True))
    )
    given = DISTILLATION.settings(GkdConfig())
    assert DISTILLATION.settings(GkdConfig(gkd_beta=1.0, gkd_temperature=2.0)) == given
    assert DISTILLATION.settings(GkdConfig(gkd_lambda=0.5)) == DISTILLATION.settings(GkdConfig(gkd_lambda=1.0)) != given


def test_plans_have_different_names():
    plans = {id(plan): plan.name for plan in (STAGES.get(name).rows for name in STAGES.names)}
    assert len(set(plans.values())) == len(plans)
