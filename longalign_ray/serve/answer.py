"""A model with its tokenizer: text or messages to token ids, and the engine's tokens back to text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longalign_ray.config import DataConfig
from longalign_ray.data.template import encode_prompt, load_tokenizer
from longalign_ray.errors import AnswerTimeoutError, ServingError
from longalign_ray.serve.engine import FinishReason, GenerationEngine, PromptScore, Sampling, Token
from longalign_ray.serve.schema import ApiError
from longalign_ray.serve.text import Detokenizer, StopStrings

TIMED_OUT = "the answer took longer than serve.request_timeout_seconds; ask for fewer tokens, or raise the limit"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the HTTP layer knows of a model: its name on the wire, its engine, its tokenizer and its limits."""

    name: str
    engine: GenerationEngine
    tokenizer: Any
    context_length: int
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    """The end-of-turn token that training taught, and the tokenizer's EOS."""
    parent: str | None = None
    """Of an adapter, the model over whose weights it is served."""
    _token_texts: dict[int, str] = field(default_factory=dict)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of the conversation, ending with the cue to answer. Raises ApiError where the template refuses."""
        from jinja2 import TemplateError

        try:
            return encode_prompt(self.tokenizer, messages)
        except TemplateError as error:
            raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from error

    def encode_text(self, prompt: str | list[int]) -> list[int]:
        """Token ids of plain text, with the special tokens that the tokenizer puts around it; ids pass as they are."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if prompt and max(prompt) >= self.vocab_size:
            raise ApiError(400, f"prompt holds the token id {max(prompt)}; ids end at {self.vocab_size - 1}")
        return prompt

    def token_text(self, token_id: int) -> str:
        """Text of a token by itself; kept, as a long scored prompt asks for thousands."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return text


def served_model(name: str, engine: GenerationEngine, model_dir: Path, *, chat_template: str | None) -> ServedModel:
    """The model of a local directory behind `engine`. Raises ModelError where tokenizer or template are missing."""
    from transformers import AutoConfig

    tokenizer = load_tokenizer(model_dir, chat_template=chat_template)
    config = AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False).get_text_config()
    return ServedModel(
        name=name,
        engine=engine,
        tokenizer=tokenizer,
        context_length=getattr(config, "max_position_embeddings", None) or 2**31,
        vocab_size=config.vocab_size,
        stop_token_ids=stop_token_ids(tokenizer),
    )


def stop_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """EOS, and the token that training marks as the end of an assistant's turn, found by its own rule."""
    from longalign_ray.data.conversation import Conversation, Message, RecordError
    from longalign_ray.data.tokenize import ConversationTokenizer

    ids = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    probe = Conversation("probe", (Message("user", "Hi"), Message("assistant", "Hello")), "probe")
    maker = ConversationTokenizer(tokenizer, DataConfig(max_length=2**31))
    try:
        (example,) = maker.one(probe).examples
    except RecordError:  # a template that cannot be trained on may still be served
        return tuple(ids)
    last_target = int(example.input_ids[example.loss_weight > 0][-1])
    if last_target in maker.special_ids:
        ids.add(last_target)
    return tuple(sorted(ids))


@dataclass(frozen=True, slots=True)
class Piece:
    """The next text of an answer; in the last piece why it ended. Counts are those so far."""

    text: str
    tokens: tuple[Token, ...]
    num_generated: int
    num_cached: int
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Asked:
    """One choice that a request asks for. `repeats` says that an earlier choice has the same prompt."""

    index: int
    prompt: str | list[int]
    token_ids: list[int]
    sampling: Sampling
    stop: tuple[str, ...]
    deadline: float
    """In the event loop's time."""
    repeats: bool = False


async def answer(model: ServedModel, asked: Asked) -> AsyncGenerator[Piece, None]:
    """Pieces up to the end token, a stop string or the limit; closing the generator cancels the request.

    Raises AnswerTimeoutError at the deadline, and what the engine raises.
    """
    detokenizer, stop_strings = Detokenizer(model.tokenizer), StopStrings(asked.stop)
    num_generated = 0
    async with aclosing(model.engine.submit(asked.token_ids, asked.sampling)) as events:
        while True:
            try:
                async with asyncio.timeout_at(asked.deadline):
                    event = await anext(events)
            except TimeoutError as error:
                raise AnswerTimeoutError(TIMED_OUT) from error
            except StopAsyncIteration as error:
                raise ServingError("the engine ended before the answer was complete; ask again") from error
            text, tokens = "", []
            for token in event.tokens:  # one by one, as those after a stop string are not of the answer
                text += stop_strings.push(detokenizer.push([token.token_id]))
                tokens.append(token)
                if stop_strings.found:
                    break
            num_generated = num_generated + len(tokens) if stop_strings.found else event.num_generated
            finish_reason = event.finish_reason
            if finish_reason is not None:
                text += stop_strings.push(detokenizer.finish()) + stop_strings.finish()
            if stop_strings.found:
                finish_reason = "stop"
            yield Piece(text, tuple(tokens), num_generated, event.num_cached, finish_reason)
            if finish_reason is not None:
                return  # which cancels the request, unless the engine has ended it


async def score(model: ServedModel, asked: Asked) -> PromptScore:
    """Log-probabilities of the prompt's tokens. Raises as `answer` does."""
    try:
        async with asyncio.timeout_at(asked.deadline):
            return await model.engine.score(asked.token_ids, num_top=asked.sampling.num_top)
    except TimeoutError as error:
        raise AnswerTimeoutError(TIMED_OUT) from error


async def merged(streams: Mapping[int, AsyncGenerator[Piece, None]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """(index, piece) of all streams as they come; the first failure, or closing this generator, closes all."""
    if len(streams) == 1:  # as nearly always, and then without a task for every piece
        ((index, stream),) = streams.items()
        async with aclosing(stream):
            async for piece in stream:
                yield index, piece
        return
    waiting = {asyncio.ensure_future(anext(stream)): index for index, stream in streams.items()}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                piece = task.result()
                if piece.finish_reason is None:
                    waiting[asyncio.ensure_future(anext(streams[index]))] = index
                else:
                    await streams[index].aclose()
                yield index, piece
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams.values():
            await stream.aclose()
