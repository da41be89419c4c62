"""The engine for GPUs: vLLM with paged KV caches, prefix caching, chunked prefill and tensor parallelism."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from longalign_ray.errors import ModelError, ServingError
from longalign_ray.serve.engine import EngineStats, GenerationEvent, PromptScore, Sampling, Token, TopTokens

MAX_TOP = 20  # likeliest tokens that a request may ask for
MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM has kernels


class VllmEngine:
    """A GenerationEngine on one model directory (safetensors, no remote code), in the process that makes it.

    Tokens go in and out: vLLM loads no tokenizer. `engine_args` go to vLLM as they are. Raises ServingError where vLLM
    is not installed, ModelError where it cannot load the model.

    max_tokens: of a prompt and its answer; no more than the model's window are offered.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: str,
        max_tokens: int,
        prefill_chunk: int = 2_048,
        max_sequences: int = 8,
        tensor_parallel: int = 1,
        adapters: Mapping[str, str | Path] | None = None,
        engine_args: Mapping[str, Any] | None = None,
    ):
        try:
            from vllm import AsyncEngineArgs, AsyncLLMEngine  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ServingError(
                f"serve.engine = vllm needs vLLM, which cannot be imported ({error}): install the extra `vllm`, or set "
                "serve.engine=transformers"
            ) from error
        try:
            window = context_of(model_dir)
        except (OSError, ValueError) as error:
            raise ModelError(f"{model_dir} cannot be loaded by vLLM for serving: {error}") from error
        settings: dict[str, Any] = {
            "model": str(model_dir),
            "skip_tokenizer_init": True,
            "dtype": dtype,
            "max_model_len": min(max_tokens, window or max_tokens),
            "max_num_seqs": max_sequences,
            "max_num_batched_tokens": max(prefill_chunk, max_sequences),
            "enable_chunked_prefill": True,
            "enable_prefix_caching": True,
            "tensor_parallel_size": tensor_parallel,
            "max_logprobs": MAX_TOP,
            "generation_config": "vllm",  # sampling is what the request says, not what the model's file suggests
            "load_format": "safetensors",
            "trust_remote_code": False,
        }
        settings |= adapter_args(adapters or {})
        try:
            self._engine: Any = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(**settings | dict(engine_args or {})))
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise ModelError(f"{model_dir} cannot be loaded by vLLM for serving: {error}") from error
        self._adapters = {name: (number, str(path)) for number, (name, path) in enumerate((adapters or {}).items(), 1)}
        self._end_ids = end_token_ids(model_dir)
        self._numbers = itertools.count()
        self._counts: Counter[str] = Counter()

    async def submit(
        self, token_ids: Sequence[int], sampling: Sampling, *, adapter: str | None = None
    ) -> AsyncGenerator[GenerationEvent, None]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        ends = self._end_ids.union(sampling.stop_token_ids)
        asked = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop_token_ids=sorted(ends),
            logprobs=sampling.num_top,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        num_generated = num_cached = 0
        async with aclosing(self._outputs(token_ids, asked, adapter)) as outputs:
            async for output in outputs:
                made = output.outputs[0]
                num_generated, num_cached = num_generated + len(made.token_ids), output.num_cached_tokens or 0
                self._counts["computed_tokens"] += len(made.token_ids)
                tokens = [
                    _token(token_id, places, sampling.num_top)
                    for token_id, places in zip(made.token_ids, made.logprobs, strict=True)
                    if token_id not in ends
                ]
                if made.finish_reason not in (None, "stop", "length"):
                    raise ServingError(f"vLLM gave the request up ({made.finish_reason}); ask again")
                yield GenerationEvent(
                    tokens=tuple(tokens),
                    num_generated=num_generated,
                    finish_reason=made.finish_reason,
                    num_cached=num_cached,
                )
        self._counts["prompt_tokens"] += len(token_ids)
        self._counts["generated_tokens"] += num_generated
        self._counts["cached_tokens"] += num_cached

    async def score(self, token_ids: Sequence[int], *, num_top: int = 0, adapter: str | None = None) -> PromptScore:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=num_top, detokenize=False)
        async with aclosing(self._outputs(token_ids, asked, adapter)) as outputs:
            async for output in outputs:
                tokens = [
                    _token(token_id, places, num_top)
                    for token_id, places in zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)
                ]
                self._counts["prompt_tokens"] += len(token_ids)
                return PromptScore(tuple(token.log_prob for token in tokens), tuple(token.top for token in tokens))
        raise ServingError("vLLM ended without a result; ask again")

    async def _outputs(self, token_ids: Sequence[int], asked: Any, adapter: str | None) -> AsyncGenerator[Any, None]:
        """vLLM's outputs of a request; closing the generator aborts it."""
        if not token_ids:
            raise ServingError("the prompt has no tokens; send at least one")
        prompt = {"prompt_token_ids": list(token_ids)}
        lora = None if adapter is None else self._lora_request(adapter)
        self._counts["active"] += 1
        outcome = "cancelled"
        try:
            number = str(next(self._numbers))
            async with aclosing(self._engine.generate(prompt, asked, number, lora_request=lora)) as outputs:
                async for output in outputs:
                    if output.finished:
                        outcome = "finished"
                    yield output
        except ServingError:
            raise
        except Exception as error:  # vLLM's own kinds are many: a dead engine, a refused parameter
            outcome = "failed"
            raise ServingError(f"generation failed: {type(error).__name__}: {error or 'no message'}") from error
        finally:
            self._counts["active"] -= 1
            self._counts[outcome] += 1

    def _lora_request(self, name: str) -> Any:
        """vLLM loads an adapter with the first request for it, and keys its prefix cache by it."""
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        number, path = self._adapters[name]
        return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)

    async def stats(self) -> EngineStats:
        """What vLLM holds back for want of room is among the active ones; of tokens, it tells of generated ones."""
        names = [field.name for field in dataclasses.fields(EngineStats)]
        return EngineStats(**{name: self._counts[name] for name in names})

    @property
    def is_alive(self) -> bool:
        """Whether vLLM's own processes still run."""
        return not self._engine.errored

    def close(self) -> None:
        """Fails what is under way and ends vLLM's processes."""
        self._engine.shutdown()


def adapter_args(adapters: Mapping[str, str | Path]) -> dict[str, Any]:
    """vLLM's settings for LoRA adapters, none without any. Raises ModelError where one cannot be served."""
    from longalign_ray.serve.lora import read_settings

    if not adapters:
        return {}
    largest, path = max((read_settings(path).rank, str(path)) for path in adapters.values())
    room = next((rank for rank in MAX_RANKS if rank >= largest), None)
    if room is None:
        raise ModelError(
            f"{path} has rank {largest}, and vLLM takes up to {MAX_RANKS[-1]}: set serve.engine=transformers, or merge "
            "it into its base model"
        )
    # One place stays empty: beside an adapter's rows, vLLM's kernels for CPUs give those of the base the last one's.
    return {"enable_lora": True, "max_lora_rank": room, "max_loras": len(adapters) + 1}


def context_of(model_dir: str | Path) -> int | None:
    """Tokens that the model's config allows in all, if it says so."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def end_token_ids(model_dir: str | Path) -> frozenset[int]:
    """Tokens at which the model's own generation config, else its config, ends a text."""
    from transformers import AutoConfig, GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(str(model_dir)).eos_token_id
    except OSError:
        ids = AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False).eos_token_id
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])


def _token(token_id: int, places: Mapping[int, Any], num_top: int) -> Token:
    """`places`: vLLM's entry for a position, the token itself and the likeliest ones by id."""
    best = sorted((place.rank, other) for other, place in places.items())[:num_top]
    top: TopTokens = tuple((other, places[other].logprob) for _, other in best)
    return Token(token_id, places[token_id].logprob, top)
