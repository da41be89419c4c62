"""Log-probabilities as OpenAI writes them: one shape for /v1/completions, another for chat."""

from __future__ import annotations

from collections.abc import Sequence

from longalign_ray.serve.answer import ServedModel
from longalign_ray.serve.engine import PromptScore, Token, TopTokens
from longalign_ray.serve.schema import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from longalign_ray.serve.text import REPLACEMENT


def completion_logprobs(
    model: ServedModel,
    tokens: Sequence[Token],
    *,
    prompt_ids: Sequence[int] = (),
    prompt_score: PromptScore | None = None,
    start: int = 0,
) -> CompletionLogprobs:
    """The prompt's tokens, if they were scored, and then the generated ones; text offsets count from `start`."""
    ids: list[int] = []
    log_probs: list[float | None] = []
    top: list[TopTokens | None] = []
    if prompt_score is not None:
        ids += prompt_ids
        log_probs += [None, *prompt_score.log_probs]
        top += [None, *prompt_score.top]
    ids += [token.token_id for token in tokens]
    log_probs += [token.log_prob for token in tokens]
    top += [token.top for token in tokens]
    texts = [model.token_text(token_id) for token_id in ids]
    offsets = [start]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return CompletionLogprobs(
        tokens=texts,
        token_logprobs=log_probs,
        top_logprobs=[_by_text(model, entry) for entry in top],
        text_offset=offsets[:-1],
    )


def chat_logprobs(model: ServedModel, tokens: Sequence[Token]) -> ChatLogprobs:
    content = [
        TopLogprob(
            **_entry(model, token.token_id, token.log_prob).model_dump(),
            top_logprobs=[_entry(model, token_id, log_prob) for token_id, log_prob in token.top],
        )
        for token in tokens
    ]
    return ChatLogprobs(content=content)


def _entry(model: ServedModel, token_id: int, log_prob: float) -> TokenLogprob:
    text = model.token_text(token_id)
    return TokenLogprob(token=text, logprob=log_prob, bytes=None if REPLACEMENT in text else list(text.encode()))


def _by_text(model: ServedModel, top: TopTokens | None) -> dict[str, float] | None:
    """Two tokens may have the same text, such as parts of a character; the likelier one keeps its place."""
    if top is None:
        return None
    named: dict[str, float] = {}
    for token_id, log_prob in top:
        named.setdefault(model.token_text(token_id), log_prob)
    return named
