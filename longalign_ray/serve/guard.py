"""What a request passes before anything reads it: the API key and the limit on its body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longalign_ray.api_keys import is_known
from longalign_ray.serve.api_errors import error_response
from longalign_ray.serve.document_page import PAGE_FILES
from longalign_ray.serve.schema import ApiError

OPEN_PATHS = ("/health", *PAGE_FILES)
"""For load balancers, which have no key, and browsers, which send none with an address that is typed. The first says no
more than whether the models are ready, the page's files say nothing of this server."""


class Guard:
    """ASGI middleware. Without `key_digests` every client may enter."""

    def __init__(self, app: ASGIApp, *, key_digests: Sequence[bytes], max_body_bytes: int):
        self._app = app
        self._key_digests = tuple(key_digests)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            self._check_key(scope["path"], headers)
            body = await self._read_body(headers, receive)
        except ApiError as error:
            return await error_response(error)(scope, receive, send)
        if body is None:
            return None
        unread = [body]

        async def receive_read() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()  # which tells when the client leaves

        return await self._app(scope, receive_read, send)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self._key_digests or path in OPEN_PATHS:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not is_known(key.strip(), self._key_digests):
            raise ApiError(
                401,
                "no valid API key; send one of the server's as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body, None if the client left. Raises ApiError 413 as soon as it is known to be too large."""
        stated = headers.get(b"content-length", b"0")
        if stated.isdigit() and len(stated) < 20:
            self._check_size(int(stated))
        parts: list[bytes] = []
        size = 0
        while True:
            message: Any = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._check_size(size)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_body_bytes:
            raise ApiError(
                413,
                f"the body has {num_bytes} bytes or more and serve.max_body_bytes is {self._max_body_bytes}; send less",
                code="request_too_large",
            )
