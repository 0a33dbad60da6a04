"""Chat templates as models bring them along, each with a trait that makes chat formats hard."""

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a kind assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A default system text, and no tools."""

LLAMA3 = (
    "{{- bos_token }}"
    "{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif -%}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{% endif -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}"
    "{%- if tools is defined and tools is not none %}"
    "{%- set first = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{{- '<|start_header_id|>user<|end_header_id|>\n\nAnswer with JSON of a call of these functions.\n\n' }}"
    "{%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\n\n' }}{% endfor -%}"
    "{{- first + '<|eot_id|>' }}"
    "{% endif -%}"
    "{%- for message in messages %}"
    "{%- if 'tool_calls' in message %}"
    "{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif -%}"
    "{%- set call = message.tool_calls[0].function %}"
    '{{- \'<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}"
    "{%- elif message.role == 'tool' %}"
    "{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + message.content + '<|eot_id|>' }}"
    "{%- else %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif -%}"
)
"""A date, trimmed contents, and tools that stand in the first question."""

MISTRAL = (
    "{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set talk = messages[1:] %}"
    "{%- else %}{% set talk = messages %}{% endif -%}"
    "{{- bos_token }}"
    "{%- for message in talk %}"
    "{%- if message.role == 'user' %}"
    "{%- if tools and loop.first %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif -%}"
    "{%- if loop.first and system is defined %}{{- '[INST] ' + system + '\n\n' + message.content + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{% endif -%}"
    "{%- elif message.tool_calls is defined %}"
    "{{- '[TOOL_CALLS] [' }}{%- for call in message.tool_calls %}"
    "{%- if call.id | length != 9 %}{{ raise_exception('ids of calls have nine characters') }}{% endif -%}"
    "{{- '{\"name\": ' + call.function.name | tojson + ', \"arguments\": ' + call.function.arguments | tojson }}"
    "{{- ', \"id\": ' + call.id | tojson + '}' }}{{- ', ' if not loop.last else '' }}{% endfor -%}"
    "{{- ']' + eos_token }}"
    "{%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}"
    "{%- elif message.role == 'tool' %}"
    "{{- '[TOOL_RESULTS] {\"content\": ' + message.content | tojson + ', \"call_id\": ' }}"
    "{{- message.tool_call_id | tojson + '}[/TOOL_RESULTS]' }}"
    "{%- else %}{{ raise_exception('unknown role') }}{% endif -%}"
    "{%- endfor %}"
)
"""The system text is merged into the first question, and nothing opens an answer."""

QWEN3 = (
    "{%- if tools %}"
    "{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{% endif -%}"
    "{{- '# Tools\n\n<tools>' }}{%- for tool in tools %}{{- '\n' + tool | tojson }}{% endfor -%}"
    "{{- '\n</tools><|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- set seen = namespace(last=0) %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{% set seen.last = loop.index0 %}{% endif -%}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}"
    "{%- set content = message.content %}{%- set thought = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif -%}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > seen.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif -%}"
    "{{- content }}"
    "{%- for call in message.tool_calls or [] %}{{- '\n' if not loop.first or content else '' }}"
    '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{% endfor -%}"
    "{{- '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif -%}"
    "{%- endif %}"
)
"""Earlier thoughts are dropped, and only what follows the last question has an empty one."""

GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('not alternating') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
"""Refuses a system text."""

STRIPS = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content.strip() + '\n\n' }}"
    "{% elif message.role == 'user' %}{{ 'USER: ' + message.content.strip() + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message.content.strip() + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
"""Blanks around the contents vanish, and no special token but the eos."""

R1 = (
    "{{ bos_token }}{% for message in messages %}{% set content = message.content %}"
    "{% if message.role == 'user' %}{{ '<|User|>' + content }}"
    "{% elif message.role == 'assistant' %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|Assistant|>' + content + eos_token }}"
    "{% else %}{{ content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
"""The prompt opens a thought, and no answer is written with one."""

LAST_QUESTION = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + message.content + '[/INST]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)
"""The system text stands in the question that waits for an answer, and nowhere once it is answered."""

OPEN_END = (
    "{% for message in messages %}{{ '[' + message.role + ']' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
"""Nothing ends an answer but the next question."""

PROGRAMS = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "strips": STRIPS,
    "r1": R1,
    "last question": LAST_QUESTION,
    "open end": OPEN_END,
}
MARKS = (
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("[INST]", "[/INST]", "<|User|>", "<|Assistant|>"),
)
ENDS = {"chatml": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
"""What ends an answer, where it is not the eos of the byte tokenizer."""


def tokenizer_with(name: str, **special):
    """The byte tokenizer with one of `PROGRAMS`."""
    from tests.tiny import byte_tokenizer

    tokenizer = byte_tokenizer(additional_special_tokens=list(MARKS), **special)
    tokenizer.chat_template = PROGRAMS[name]
    return tokenizer
