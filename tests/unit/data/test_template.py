from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from longalign_ray.data.template import encode_prompt, load_tokenizer, render_prompt
from longalign_ray.errors import ModelError


def test_prompt_ends_with_the_cue(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir)
    messages = [{"role": "user", "content": "Hi"}]
    assert render_prompt(tokenizer, messages) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encode_prompt(tokenizer, messages)) == render_prompt(tokenizer, messages)


def test_prompt_is_a_prefix_of_the_training_example(tiny_model_dir: Path) -> None:
    from longalign_ray.config import DataConfig
    from longalign_ray.data.conversation import Conversation, Message
    from longalign_ray.data.tokenize import ConversationTokenizer

    tokenizer = load_tokenizer(tiny_model_dir)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}])
    talk = Conversation("x", (Message("user", "Hi"), Message("assistant", "Yo")), "test")
    (example,) = ConversationTokenizer(tokenizer, DataConfig()).one(talk).examples
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert example.loss_weight.tolist().index(100) == len(prompt)


def test_directory_without_tokenizer_or_template(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model_dir, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        load_tokenizer(bare)
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}")
    tokenizer = load_tokenizer(bare, chat_template=str(tmp_path / "own.jinja"))
    assert render_prompt(tokenizer, [{"role": "user", "content": "Hi"}]) == "Hi"
    with pytest.raises(ModelError, match=r"missing\.jinja"):
        load_tokenizer(bare, chat_template=str(tmp_path / "missing.jinja"))
