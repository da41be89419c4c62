"""The Serve application with vLLM in its replica, asked through the openai client."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from longalign_ray.config import ServeConfig
from longalign_ray.data.template import encode_prompt, load_tokenizer

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
MESSAGES: Any = [{"role": "user", "content": "What is long context? " * 40}]


def test_a_served_model_answers_as_generate(model_dir: Path, model: Any, local_ray: None) -> None:
    from longalign_ray.serve.app import running_app

    tokenizer: Any = load_tokenizer(model_dir)
    prompt = torch.tensor([encode_prompt(tokenizer, MESSAGES)])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    expected = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = ServeConfig(port=port, engine="vllm", vllm_args={"enforce_eager": True})
    with running_app({"tiny": model_dir}, config, chat_template=None, dtype="float32") as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
        answer = client.chat.completions.create(**asked)
        assert answer.choices[0].message.content == expected
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == prompt.shape[1]
        chunks = [chunk for chunk in client.chat.completions.create(**asked, stream=True) if chunk.choices]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        scored = client.completions.create(
            model="tiny", prompt=prompt[0].tolist(), max_tokens=0, echo=True, logprobs=0, temperature=0
        )
        with torch.no_grad():
            logs_TV = model(prompt).logits[0].log_softmax(-1)
        logprobs: Any = scored.choices[0].logprobs
        expected_logs = logs_TV[:-1].gather(1, prompt[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs.token_logprobs[1:]), expected_logs, rtol=1e-3, atol=1e-3)
        again = client.chat.completions.create(**asked)
        assert again.usage is not None
        assert again.usage.prompt_tokens_details is not None
        assert again.usage.prompt_tokens_details.cached_tokens
