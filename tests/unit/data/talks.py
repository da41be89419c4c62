"""Conversations and chat templates for tests, and a way to see targets: as text, in order, with their weights."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np

from longalign_ray.config import DataConfig
from longalign_ray.data.conversation import Conversation, Message
from longalign_ray.data.store import Example
from longalign_ray.data.template import Tokenizer
from longalign_ray.data.tokenize import ConversationTokenizer

# Role headers between special tokens and a blank line, contents stripped, BOS once; tools go into the first user turn,
# calls are JSON, and results are JSON-quoted under a role name of their own.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + ('ipython' if m['role'] == 'tool' else m['role']) + '<|im_start|>\\n\\n' }}"
    "{% if m['role'] == 'user' and loop.index0 == 0 and tools %}"
    "{{ 'Functions: ' + (tools | tojson) + '\\n\\n' }}{% endif %}"
    "{% if m['role'] == 'tool' %}{{ m['content'] | tojson }}"
    "{% elif m['tool_calls'] %}{% set f = m['tool_calls'][0]['function'] %}"
    "{{ '{\"name\": \"' + f['name'] + '\", \"parameters\": ' + (f['arguments'] | tojson) + '}' }}"
    "{% else %}{{ m['content'] | trim }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_start|>\\n\\n' }}{% endif %}"
)

# ChatML in which a thought is written for the last turn alone, empty if there is none; tools in a system turn, calls in
# tags after the text, and results as a user's turn, several in one.
THINKING = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{{ '\\n' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{% if messages[loop.index0 - 1]['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<result>\\n' + m['content'] + '\\n</result>' }}"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% elif m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% if loop.last %}{{ '<think>\\n' + (parts[0].split('<think>')[-1].strip() if parts | length > 1 else '') "
    "+ '\\n</think>\\n\\n' }}{% endif %}{{ parts[-1].strip() }}"
    "{% for c in m['tool_calls'] %}{% set f = c['function'] %}"
    "{{ '\\n<call>' + f['name'] + ' ' + (f['arguments'] | tojson) + '</call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Tools stand before the last user turn, so that a longer talk does not begin like a shorter one; results follow calls.
TOOLS_LAST = (
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% if tools and m['content'] == users[-1]['content'] %}"
    "{{ '[TOOLS]' + (tools | tojson) }}{% endif %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'tool' %}{% if not messages[loop.index0 - 1]['tool_calls'] %}"
    "{{ raise_exception('a result without a call') }}{% endif %}{{ '[RESULT]' + m['content'] + '[/RESULT]' }}"
    "{% elif m['tool_calls'] %}{{ '[CALLS]' + (m['tool_calls'] | tojson) + eos_token }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no role ' + m['role']) }}{% endif %}{% endfor %}"
)

STRIPPING = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
NO_END_OF_TURN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
UPPER = "{% for m in messages %}{{ '<|im_start|>' + m['content'].upper() + '<|im_end|>' }}{% endfor %}"


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def talk(*turns: str, roles: tuple[str, ...] = ("user", "assistant"), system: str | None = None) -> Conversation:
    messages = [Message(role, text) for role, text in zip(itertools.cycle(roles), turns, strict=False)]
    head = [] if system is None else [Message("system", system)]
    return Conversation("c", (*head, *messages), "test")


def call(name: str, **arguments: Any) -> tuple[dict[str, Any], ...]:
    return ({"type": "function", "function": {"name": name, "arguments": arguments}},)


def tokenized(tokenizer: Tokenizer, conversation: Conversation, **config: Any) -> Example:
    settings = DataConfig(**{"max_length": 10**6, **config})
    (example,) = ConversationTokenizer(tokenizer, settings).one(conversation).examples
    return example


def weighted_texts(tokenizer: Tokenizer, example: Example) -> list[tuple[int, str]]:
    """Each run of equal weight with its text."""
    edges = np.flatnonzero(np.diff(example.loss_weight)) + 1
    runs = np.split(np.arange(example.length), edges)
    return [(int(example.loss_weight[run[0]]), tokenizer.decode(example.input_ids[run])) for run in runs]


def targets(tokenizer: Tokenizer, example: Example) -> list[str]:
    """Text of each run of targets."""
    return [text for weight, text in weighted_texts(tokenizer, example) if weight]
