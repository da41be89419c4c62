"""Chat templates: one rendering for training, serving and evaluation, so that all three see the same prompt."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longalign_ray.data.store import STORE_FORMAT
from longalign_ray.errors import ModelError

Tokenizer = Any  # transformers.PreTrainedTokenizerBase; named here so that this file imports without transformers

TEMPLATES = Path(__file__).parent / "templates"
BUILT_IN = ("chatml", "llama-2", "chatglm3-rounds")
TOKENIZER_FILE = re.compile(r"token|template|^vocab|^merges|\.model$|\.jinja$")
CHATML_END = "<|im_end|>"


def load_tokenizer(model_dir: str | Path, *, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of a local model directory.

    `chat_template` replaces its own: the name of a built-in template, or a file with a Jinja template.
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
    if chat_template in BUILT_IN:
        tokenizer.chat_template = built_in_template(chat_template, tokenizer)
    elif chat_template is not None:
        tokenizer.chat_template = _template_text(chat_template)
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {model_dir} has no chat template; name one with model.chat_template=NAME, of "
            f"{', '.join(BUILT_IN)}, or model.chat_template=FILE"
        )
    return tokenizer


def built_in_template(name: str, tokenizer: Tokenizer) -> str:
    """The template with the tokenizer's own prefix (such as BOS) and end-of-turn token written into it.

    Raises ModelError where the tokenizer has no token to end a turn with.
    """
    has_chatml_end = CHATML_END in tokenizer.get_vocab()
    end_of_turn = CHATML_END if name == "chatml" and has_chatml_end else tokenizer.eos_token
    if not end_of_turn:
        raise ModelError(f"model.chat_template = {name} ends turns with EOS, and the tokenizer has none; set eos_token")
    constants = {"prefix": tokenizer_prefix(tokenizer), "end_of_turn": end_of_turn}
    header = "".join(f"{{%- set {key} = {json.dumps(value)} -%}}\n" for key, value in constants.items())
    return header + _template_text(name)


def _template_text(chat_template: str) -> str:
    path = TEMPLATES / f"{chat_template}.jinja" if chat_template in BUILT_IN else Path(chat_template)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"model.chat_template = {chat_template} is no built-in template ({', '.join(BUILT_IN)}), and as a file "
            f"it cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error


def tokenising_state(model_dir: str | Path, chat_template: str | None) -> list[Any]:
    """What the tokens and weights of a conversation depend on beside the settings: the package's STORE_FORMAT, the text
    of the chat template, and a hash of each file that the tokenizer is read from, none where `model_dir` is no
    directory here. A copy elsewhere has the same state. Raises ModelError where the template cannot be read.
    """
    files = sorted(path for path in Path(model_dir).glob("*") if TOKENIZER_FILE.search(path.name) and path.is_file())
    hashes = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return [STORE_FORMAT, None if chat_template is None else _template_text(chat_template), hashes]


def tokenizer_prefix(tokenizer: Tokenizer) -> str:
    """The tokens that the tokenizer puts before a text by its own rule, e.g. `<s>` for Llama-2 and none for Qwen."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    count = next(start for start in range(len(whole) + 1) if whole[start : start + len(bare)] == bare)
    return "".join(tokenizer.convert_ids_to_tokens(whole[:count]))


def absolute_template(chat_template: str | None) -> str | None:
    """The same template for a process that runs in another directory."""
    return chat_template if chat_template is None or chat_template in BUILT_IN else str(Path(chat_template).resolve())


def render_prompt(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> str:
    """Text of the conversation so far, ending with the cue for the assistant to speak."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of `render_prompt`; the template alone adds special tokens."""
    return tokenizer(render_prompt(tokenizer, messages), add_special_tokens=False)["input_ids"]
