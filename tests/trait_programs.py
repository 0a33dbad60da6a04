"""Chat templates of models that call tools and think, each with a trait, and what a server must know to run them.

They take what `tests.chat_programs` leaves out: keys of thoughts, switches, ids of calls, arguments as text.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.chat_programs import LLAMA3, MISTRAL, PROGRAMS, QWEN3

_HEAD = "{{- bos_token }}{%- if tools %}{{- '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif -%}"
_JSON_CALLS = (
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "{{- '</tool_call>' }}"
    "{% endfor -%}"
)
_OTHERS = "{{- '[' + message.role + ']' + message.content + '[/' + message.role + ']' }}"

THOUGHT_KEY = (
    _HEAD + "{%- for message in messages %}{%- if message.role == 'assistant' %}{{- '[bot]' }}"
    "{%- if message.KEY %}{{- '[THINK]' + message.KEY + '[/THINK]' }}{% endif -%}"
    "{{- message.content }}" + _JSON_CALLS + "{{- '</s>' }}"
    "{%- else %}" + _OTHERS + "{% endif -%}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[bot]' }}{% endif -%}"
)
"""Thoughts stand in a key and stay in the history; tags in the text are words."""

CHANNELS = (
    _HEAD + "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{%- if message.thinking and (loop.last or message.tool_calls) %}"
    "{{- '[bot]<|channel|>analysis:' + message.thinking + '<|end|>' }}{% endif -%}"
    "{%- if message.content or not message.tool_calls %}"
    "{{- '[bot]<|channel|>' + ('commentary' if message.tool_calls else 'final') + ':' + message.content }}"
    "{{- '</s>' if loop.last and not message.tool_calls else '<|end|>' }}{% endif -%}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '[bot] to=' + call.function.name + '<|channel|>commentary:' + call.function.arguments | tojson }}"
    "{{- '</s>' if loop.last else '<|end|>' }}{% endfor -%}"
    "{%- else %}" + _OTHERS + "{% endif -%}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[bot]' }}{% endif -%}"
)
"""Thoughts and answers in channels; the last answer ends in another token than earlier ones."""

SWITCH = (
    _HEAD + "{%- if thinking is not defined %}{% set thinking = false %}{% endif -%}"
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{%- set text = message.content %}"
    "{%- if '</think>' in text %}{% set text = text.split('</think>', 1)[1] %}{% endif -%}"
    "{{- '[bot]</think>' + text }}" + _JSON_CALLS + "{{- '</s>' }}"
    "{%- else %}" + _OTHERS + "{% endif -%}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[bot]' + ('<think>' if thinking else '</think>') }}{% endif -%}"
)
"""The switch is called `thinking`; the prompt opens the thought, and no answer is written with one."""

STRIPS_THOUGHT = (
    _HEAD + "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{{- '[bot]' + message.content.split('</think>')[-1] }}" + _JSON_CALLS + "{{- '</s>' }}"
    "{%- else %}" + _OTHERS + "{% endif -%}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[bot]' }}{% endif -%}"
)
"""Every answer is written without its thought, the last one too."""

OPENS_THOUGHT = (
    _HEAD + "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{%- set parts = message.content.split('</think>') %}"
    "{%- set thought = message.reasoning_content or (parts[0].split('<think>')[-1] if parts | length > 1 else '') %}"
    "{{- '[bot]\n' }}{%- if loop.last %}{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif -%}"
    "{{- parts[-1].lstrip('\n') }}" + _JSON_CALLS + "{{- '</s>' }}"
    "{%- else %}" + _OTHERS + "{% endif -%}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[bot]\n<think>\n' }}{% endif -%}"
)
"""The prompt opens the thought, and only the last answer is written with one."""

TEXT_ARGUMENTS = (
    _HEAD + "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{{- '[bot]' + message.content }}{%- for call in message.tool_calls or [] %}"
    "{{- '<call>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```' }}{% endfor -%}{{- '</s>' }}"
    "{%- else %}" + _OTHERS + "{% endif -%}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[bot]' }}{% endif -%}"
)
"""Arguments are joined to other text, which fails for objects."""

PRINTED_ARGUMENTS = TEXT_ARGUMENTS.replace("+ call.function.arguments +", "~ call.function.arguments ~")
"""Objects come out in Python's notation."""

CALL_IDS = (
    _HEAD + "{%- for message in messages %}{%- if message.role == 'tool' %}"
    "{{- '[RESULT]' + {'content': message.content, 'id': message.tool_call_id} | tojson + '[/RESULT]' }}"
    "{%- elif message.role == 'assistant' %}{{- '[bot]' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}{% endfor -%}"
    "{{- '</s>' }}"
    "{%- else %}" + _OTHERS + "{% endif -%}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[bot]' }}{% endif -%}"
)
"""Calls and results are JSON with the id of the call."""

OPTIONAL_IDS = CALL_IDS.replace("message.tool_call_id}", "message.tool_call_id or ''}").replace(
    "{{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}",
    "{{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "{%- if call.id %}{{- '#' + call.id }}{% endif -%}",
)
GAPS = CALL_IDS.replace("'id': message.tool_call_id}", "'id': message.tool_call_id or ''}").replace(
    "'id': call.id}", "'id': call.id or ''}"
)
"""Without an id its place stays empty."""

GROUPED_RESULTS = QWEN3.replace(
    "{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}",
    "{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif -%}"
    "{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{% endif -%}",
).replace("{%- set thought = '' %}", "{%- set thought = message.reasoning_content or '' %}")
"""The results of parallel calls share one turn; thoughts in a key or in the text."""


@dataclass(frozen=True)
class Model:
    """A template, and what must be known to send messages to it."""

    chat_template: str
    thought_key: str = "reasoning_content"
    moves_inline: bool = False
    """Whether a thought that the text begins with has to be given in the key."""
    text_arguments: bool = False
    ids: str = ""
    """`nine`: required, of nine characters; `written`: required and part of the answer; empty: may be absent."""
    refuses: tuple[str, ...] = ()
    """Reasons for which it cannot be given some conversations."""


_NO_TOOLS = "does not render tools"
MODELS = {
    **{name: Model(PROGRAMS[name], refuses=(_NO_TOOLS,)) for name in ("chatml", "strips", "r1", "open end")},
    "gemma": Model(PROGRAMS["gemma"], refuses=(_NO_TOOLS, "not alternating", "System role not supported")),
    "last question": Model(PROGRAMS["last question"], refuses=(_NO_TOOLS, "renders the prompt differently")),
    "llama3": Model(LLAMA3, refuses=("one call at a time", "does not write")),  # no text beside a call
    "mistral": Model(MISTRAL, ids="nine", refuses=("does not write",)),
    "qwen3": Model(QWEN3),
    "thought key": Model(THOUGHT_KEY.replace("KEY", "reasoning_content"), moves_inline=True),
    "reasoning": Model(THOUGHT_KEY.replace("KEY", "reasoning"), thought_key="reasoning", moves_inline=True),
    "channels": Model(CHANNELS, thought_key="thinking", moves_inline=True),
    "switch": Model(SWITCH),
    "strips thought": Model(STRIPS_THOUGHT),
    "opens thought": Model(OPENS_THOUGHT),
    "text arguments": Model(TEXT_ARGUMENTS, text_arguments=True),
    "printed arguments": Model(PRINTED_ARGUMENTS, text_arguments=True),
    "call ids": Model(CALL_IDS, ids="written"),
    "optional ids": Model(OPTIONAL_IDS),
    "gaps": Model(GAPS, ids="written"),
    "grouped results": Model(GROUPED_RESULTS),
}


@cache
def model_tokenizer(name: str) -> Any:
    """Bytes, with merges of line breaks and blanks, so that tokens can span the border of a prompt and its answer."""
    return merging_tokenizer(MODELS[name].chat_template)


def merging_tokenizer(chat_template: Any) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "a"), ("]", "Ċ")]
    backend = Tokenizer(
        models.BPE(vocab={s: i for i, s in enumerate([*alphabet, *map("".join, merges)])}, merges=merges)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>", "<tool_call>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )
