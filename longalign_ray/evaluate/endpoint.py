"""An OpenAI-compatible endpoint: posts JSON, tries again what may be tried again, names every failure."""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from longalign_ray.errors import EvaluationError

CONNECT_SECONDS = 10.0
LONGEST_BACKOFF_SECONDS = 30.0


class RequestFailed(Exception):
    """A request without an answer after all tries; `reason` is the short name under which it is counted."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class Endpoint:
    """An async context manager around one HTTP client.

    Timeouts, broken connections, 429 and 5xx are tried up to `max_attempts` times, after the server's Retry-After or,
    without one, after backoff_seconds * 2^n with jitter. Every other failure is final at once. `num_retries` counts.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_seconds: float,
        max_attempts: int,
        concurrency: int,
        api_key: str | None = None,
        backoff_seconds: float = 0.5,
    ):
        self.base_url = base_url.rstrip("/")
        self.timeout_seconds = timeout_seconds
        self.max_attempts = max_attempts
        self.backoff_seconds = backoff_seconds
        self.num_retries = 0
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._concurrency = concurrency

    async def __aenter__(self) -> Endpoint:
        self._client = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=min(CONNECT_SECONDS, self.timeout_seconds)),
            connector=aiohttp.TCPConnector(limit=self._concurrency),
            # no proxy to this machine
            trust_env=urlsplit(self.base_url).hostname not in ("127.0.0.1", "::1", "localhost"),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def check_models(self, wanted: tuple[str, ...]) -> None:
        """Returns when the endpoint serves all of `wanted`; else raises EvaluationError that says what is wrong."""
        url = f"{self.base_url}/models"
        remedy = (
            "set evaluate.endpoint to the base URL of a running OpenAI-compatible server, such as http://HOST:8000/v1"
        )
        try:
            async with (
                asyncio.timeout(min(60.0, self.timeout_seconds)),
                self._client.get(url, allow_redirects=False) as response,
            ):
                status, body = response.status, await response.read()
        except (TimeoutError, aiohttp.ClientError) as error:
            raise EvaluationError(f"{url} does not answer ({type(error).__name__}: {error}): {remedy}") from error
        if status == 401:
            raise EvaluationError(f"{url} answers 401: set evaluate.api_key to env:NAME or file:PATH, where a key is")
        if status != 200:
            raise EvaluationError(f"{url} answers {status} {_start(body)!r}: {remedy}")
        try:
            served = [model["id"] for model in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{url} answers with no list of models ({_start(body)!r}): {remedy}") from error
        unknown = [name for name in wanted if name not in served]
        if unknown:
            raise EvaluationError(
                f"evaluate.models names {', '.join(unknown)}, and {self.base_url} serves {', '.join(served) or 'none'}"
                f": set evaluate.models to names from that list"
            )

    async def post(
        self, path: str, body: dict[str, Any], *, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """The JSON object that the endpoint answers. Raises RequestFailed after the last try."""
        for attempt in range(1, self.max_attempts + 1):
            try:
                return await self._post_once(path, body, headers)
            except _Retryable as failure:
                if attempt == self.max_attempts:
                    raise RequestFailed(failure.reason, f"{failure} (try {attempt})") from failure
                self.num_retries += 1
                await asyncio.sleep(self._pause(failure.retry_after, attempt))
        raise AssertionError("max_attempts is at least 1")

    async def _post_once(self, path: str, body: dict[str, Any], headers: Mapping[str, str] | None) -> dict[str, Any]:
        url = self.base_url + path
        try:
            async with (
                asyncio.timeout(self.timeout_seconds),
                self._client.post(url, json=body, headers=headers, allow_redirects=False) as response,
            ):
                status, retry_after, content = (
                    response.status,
                    response.headers.get("retry-after"),
                    await response.read(),
                )
        except TimeoutError as error:
            raise _Retryable("timeout", f"no answer within {self.timeout_seconds:g} s") from error
        except aiohttp.ClientError as error:
            raise _Retryable("connection", f"{type(error).__name__}: {error}") from error
        if status == 429 or status >= 500:
            raise _Retryable(f"http_{status}", _start(content), _retry_after(retry_after))
        if status != 200:
            raise RequestFailed(f"http_{status}", _start(content))
        try:
            answer = json.loads(content)
        except ValueError as error:
            raise RequestFailed("bad_json", f"{_start(content)!r} is not JSON") from error
        if not isinstance(answer, dict):
            raise RequestFailed("bad_json", f"a {type(answer).__name__} instead of an object")
        return answer

    def _pause(self, retry_after: float | None, attempt: int) -> float:
        """Seconds before the next try; a server cannot ask for more than the limit of one answer."""
        if retry_after is not None:
            return min(retry_after, self.timeout_seconds)
        return min(self.backoff_seconds * 2 ** (attempt - 1), LONGEST_BACKOFF_SECONDS) * random.uniform(0.5, 1.0)


class _Retryable(Exception):
    def __init__(self, reason: str, detail: str, retry_after: float | None = None):
        super().__init__(detail)
        self.reason, self.retry_after = reason, retry_after


def _start(content: bytes) -> str:
    return content[:200].decode(errors="replace")


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait for a Retry-After header, which holds seconds or a date; None where it holds neither."""
    if header is None:
        return None
    try:
        return max(float(header), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
