"""The page at `/` that asks about a long document: its files, and the route that reads a PDF's text for it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from longalign_ray.serve import pdf_reader
from longalign_ray.serve.schema import ApiError

PAGE_DIR = Path(__file__).parent / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""Path to file and media type."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
MAX_PDF_SECONDS = 180.0
MAX_PDF_MEMORY_BYTES = 2 * 2**30
MAX_PDFS_AT_ONCE = 2


def add_page(api: FastAPI) -> None:
    """Gives the application the page and `POST /page/text`, whose body is a PDF and whose answer its text."""
    free = asyncio.Semaphore(MAX_PDFS_AT_ONCE)

    for path, (name, media_type) in PAGE_FILES.items():
        content = (PAGE_DIR / name).read_bytes()
        api.add_api_route(path, _sender(content, media_type), methods=["GET", "HEAD"], include_in_schema=False)

    @api.post("/page/text", include_in_schema=False)
    async def page_text(request: Request) -> Response:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/pdf":
            raise ApiError(415, f"the body is {media_type or 'of no stated type'}, and only application/pdf is read")
        pdf = await request.body()  # which the guard has limited
        if importlib.util.find_spec("pypdf") is None:
            raise ApiError(
                501,
                "PDF files need the package pypdf on the server: pip install 'longalign_ray[pdf]' there, "
                "or paste the text",
            )
        async with free:
            made = await _read_apart(pdf)
        if "error" in made:
            raise ApiError(400, made["error"])
        return JSONResponse(made, headers=HEADERS)


def _sender(content: bytes, media_type: str) -> Any:
    async def send() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return send


async def _read_apart(pdf: bytes) -> dict[str, Any]:
    """What `pdf_reader.read` says, from a process with limits on memory and time, which ends with this call."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # the reader's folder is no place to import from
        pdf_reader.__file__,
        str(MAX_PDF_MEMORY_BYTES),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,  # the parser's remarks on a file
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(pdf), MAX_PDF_SECONDS)
    except TimeoutError:
        return {"error": f"not read within {MAX_PDF_SECONDS:g} seconds; split it, or paste the text"}
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        return {
            "error": f"reading it ended with status {process.returncode}, as when it takes more than "
            f"{MAX_PDF_MEMORY_BYTES // 2**20} MiB of memory; split it, or paste the text"
        }
    return json.loads(output)
