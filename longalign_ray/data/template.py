"""Chat templates: one rendering for training, serving and evaluation, so that all three see the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longalign_ray.errors import ModelError

Tokenizer = Any  # transformers.PreTrainedTokenizerBase; named here so that this file imports without transformers


def load_tokenizer(model_dir: str | Path, *, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of a local model directory; `chat_template` is a file with a Jinja template that replaces its own.

    Raises ModelError where the directory holds no fast tokenizer or where there is no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{model_dir} has no tokenizer that transformers can load ({error}); "
            f"copy tokenizer.json and tokenizer_config.json there"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"{model_dir} has no fast tokenizer, and offsets need one; add its tokenizer.json")
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise ModelError(f"model.chat_template = {chat_template} cannot be read ({error.strerror})") from error
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer of {model_dir} has no chat template; name one with model.chat_template=FILE")
    return tokenizer


def render_prompt(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> str:
    """Text of the conversation so far, ending with the cue for the assistant to speak."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of `render_prompt`; the template alone adds special tokens."""
    return tokenizer(render_prompt(tokenizer, messages), add_special_tokens=False)["input_ids"]
