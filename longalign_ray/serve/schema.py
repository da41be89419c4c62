"""OpenAI wire types: what the endpoint reads and writes. Fields that it does not know are ignored, as OpenAI does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_serializer, model_validator


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair, which is no text") from error
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
TokenId = Annotated[int, Field(ge=0)]
Temperature = Annotated[float, Field(ge=0.0, le=2.0, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
MaxTokens = Annotated[int, Field(ge=0)]
StopString = Annotated[Text, Field(min_length=1, max_length=256)]
FinishReason = Literal["stop", "length"]

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
MAX_STOP_STRINGS = 16
MAX_TOP_LOGPROBS = 20


class GenerationRequest(BaseModel):
    """Fields that chat and plain completions share."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    model: str
    temperature: Temperature | None = None
    """None: 1. 0: greedy."""
    top_p: TopP | None = None
    """None: 1. The smallest set of tokens with at least this probability is drawn from."""
    seed: Seed | None = None
    """Same seed, same request, same tokens; None: a new draw every time."""
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    """The text ends before the first of these."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    """Choices for a prompt, None: 1. With a seed, choice k is drawn with seed + k."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage_chunk(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class StreamOptions(BaseModel):
    """`include_usage`: one more chunk before the end of the stream, with the token counts."""

    include_usage: bool = False


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One turn; a content of several text parts is joined."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates take; `developer` is OpenAI's newer name for `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of `max_tokens`, and stronger."""
    logprobs: bool | None = None
    """Log-probability of every token of the answer."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """With `logprobs`, also of this many of the likeliest tokens in its place."""

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_top(self) -> int:
        return self.top_logprobs or 0

    @model_validator(mode="after")
    def _rules(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set logprobs=true")
        return self


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions; a prompt is text or token ids, and there may be several."""

    prompt: Text | list[TokenId] | list[Text] | list[list[TokenId]]
    max_tokens: MaxTokens | None = None
    """None: 16, as OpenAI has it. 0 with `echo`: score the prompt only."""
    echo: bool | None = None
    """Put the prompt, with its log-probabilities if wanted, before the answer."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Log-probability of every token, and of this many of the likeliest tokens in its place."""

    @property
    def wanted_tokens(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_top(self) -> int:
        return self.logprobs or 0

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return list(self.prompt)  # pyright: ignore[reportReturnType]

    @model_validator(mode="after")
    def _rules(self) -> CompletionRequest:
        if not self.prompts:
            raise ValueError("prompt holds 0 prompts; send at least one")
        if self.stream and self.echo:
            raise ValueError("stream gives no echo; set stream=false")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which yields nothing without echo; set echo=true or max_tokens >= 1")
        return self


class TokenizeRequest(BaseModel):
    """Body of POST /v1/tokenize: text as /v1/completions takes it, or messages as /v1/chat/completions does."""

    model: str
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _rules(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class TokenizeResponse(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(BaseModel):
    """Body of POST /v1/detokenize."""

    model: str
    tokens: list[TokenId]


class DetokenizeResponse(BaseModel):
    prompt: str


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0


class UsageInfo(BaseModel):
    """Token counts; `completion_tokens` counts the end-of-turn token too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class TokenLogprob(BaseModel):
    """`bytes`: those of the text in UTF-8; None for a token that is part of a character, whose text is no text."""

    token: str
    logprob: float
    bytes: list[int] | None


class TopLogprob(TokenLogprob):
    """A generated token, and the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[TopLogprob]


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageInfo


class Delta(BaseModel):
    """What a chunk adds; a field that adds nothing is left out."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _given(self) -> dict[str, str]:
        return {name: value for name, value in (("role", self.role), ("content", self.content)) if value is not None}


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """One event of a streamed chat answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageInfo | None = None


class CompletionLogprobs(BaseModel):
    """One entry a token; the first token of an echoed prompt has nothing before it, so its entries are null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None


class CompletionResponse(BaseModel):
    """An answer of /v1/completions, and, with one choice, also an event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageInfo | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "longalign_ray"
    max_model_len: int
    parent: str | None = None
    """Of an adapter, the model that it is over."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class ErrorInfo(BaseModel):
    """`type`: invalid_request_error, one of KINDS, or server_error; `param`: the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorInfo


class ApiError(Exception):
    """A refused request: the HTTP status and what goes into its `error` object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}`, as OpenAI clients read it."""
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, "invalid_request_error")
        info = ErrorInfo(message=str(self), type=kind, param=self.param, code=self.code)
        return ErrorResponse(error=info).model_dump()
