"""Prompts that the model itself answers while it trains (ppo, grpo).

An answer in the data is kept as the labels of the row, for reward functions that compare with it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from luthier.core.errors import RowError
from luthier.data.chat.answers import flat_text
from luthier.data.rows.labels import IGNORE_INDEX, Encoded
from luthier.data.rows.row_plan import RowPlan, RowSettings
from luthier.data.types import Dialogue, Prompt

if TYPE_CHECKING:
    from luthier.data.chat.encoder import TurnIds
    from luthier.data.rows.encoding import Encoding
    from luthier.data.rows.tokenize import Written


def write(example: Dialogue | Prompt, encoding: "Encoding", settings: RowSettings) -> "Sequence[tuple[Written]]":
    """The prompt as a server sends it, and the plain text of the reference answer, if there is one."""
    from luthier.data.chat.render import Turn, render

    is_open = isinstance(example, Prompt)
    messages = example.messages if is_open else example.messages[:-1]
    answer = () if is_open else (flat_text(example.messages[-1]),)
    if encoding.model_template is not None:
        thinks = encoding.enable_thinking is True
        prompt = (encoding.model_template.text(messages, example.system, example.tools, asks=True, thinks=thinks),)
        return [((Turn(prompt, answer),),)]
    (turn,) = render(
        encoding.template,
        messages,
        system=example.system,
        tools=example.tools,
        enable_thinking=encoding.enable_thinking,
        preserve_thinking=encoding.preserve_thinking,
        purpose="infer",
    )
    return [((Turn(turn.prompt, answer),),)]


def label(parts: "Sequence[list[TurnIds]]", encoding: "Encoding", settings: RowSettings) -> tuple[Encoded]:
    """A prompt is never truncated: its end asks for the answer."""
    (((prompt, answer),),) = parts
    if encoding.cutoff_len is not None and len(prompt) > encoding.cutoff_len:
        raise RowError(f"the prompt has more than cutoff_len {encoding.cutoff_len} tokens")
    return (Encoded([*prompt, *answer], [IGNORE_INDEX] * len(prompt) + list(answer)),)


PROMPTS = RowPlan(name="prompts", examples=(Prompt, Dialogue), write=write, label=label, has_targets=False)
