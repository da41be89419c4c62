"""The page's files and the route that reads a PDF, without a browser."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import re
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from longalign_ray.api_keys import digests
from longalign_ray.config import ServeConfig
from longalign_ray.serve import document_page, pdf_reader
from longalign_ray.serve.api import build_api

PDF = {"Content-Type": "application/pdf"}


async def no_models() -> dict[str, bool]:
    return {}


@pytest.fixture
def client() -> TestClient:
    return TestClient(build_api({}, ServeConfig(), health=no_models), raise_server_exceptions=False)


def pdf_of(pages: Sequence[str]) -> bytes:
    """A PDF with a line of text a page, a blank page for an empty one, as the PDF Reference lays out a minimal file."""
    font_number = 3 + 2 * len(pages)
    kids = " ".join(f"{3 + 2 * index} 0 R" for index in range(len(pages)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    for index, text in enumerate(pages):
        drawn = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {4 + 2 * index} 0 R "
            f"/Resources << /Font << /F1 {font_number} 0 R >> >> >>",
            f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream",
        ]
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    made = b"%PDF-1.4\n"
    places = []
    for number, content in enumerate(objects, start=1):
        places.append(len(made))
        made += f"{number} 0 obj\n{content}\nendobj\n".encode("ascii")
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    size = len(objects) + 1
    made_at = len(made)
    end = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R >>\n"
    return made + f"{end}startxref\n{made_at}\n%%EOF\n".encode("ascii")


def message_of(response: Any) -> str:
    return response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "media_type"), [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")]
)
def test_files_come_with_strict_headers(client, path, media_type):
    response = client.get(path)
    assert (response.status_code, response.headers["content-type"]) == (200, f"{media_type}; charset=utf-8")
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert (policy["default-src"], policy["script-src"], policy["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"
    assert client.head(path).headers["content-length"] == str(len(response.content))


def test_page_needs_nothing_that_its_policy_forbids(client):
    html, css, script = (client.get(path).text for path in ("/", "/page.css", "/page.js"))
    assert re.findall(r'(?:src|href)="([^"]*)"', html) == ["data:,", "page.css", "page.js"]
    assert not re.search(r"<style| style=| on\w+=|<script(?! type=\"module\" src)", html)
    assert not re.search(r"https?:|//[a-z]", html + css)
    assert not re.search(r"@import|url\(", css)
    # what a model or a server says is text, never markup
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|cookie", script)


def test_text_of_a_pdf_with_its_empty_pages_counted(client):
    pytest.importorskip("pypdf")
    response = client.post("/page/text", content=pdf_of(["The first page", "", "and the last"]), headers=PDF)
    assert response.json() == {"text": "The first page\n\nand the last", "num_pages": 3, "num_empty_pages": 1}
    assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("password", ["secret", ""])
def test_password_that_only_an_owner_needs_is_no_hindrance(client, password):
    pytest.importorskip("pypdf")
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(pdf_of(["Kept from printing"]))))
    writer.encrypt(password, owner_password="owner", algorithm="AES-256")
    made = io.BytesIO()
    writer.write(made)
    response = client.post("/page/text", content=made.getvalue(), headers=PDF)
    if password:
        assert (response.status_code, "encrypted with a password" in message_of(response)) == (400, True)
    else:
        assert response.json()["text"] == "Kept from printing"


@pytest.mark.parametrize(
    ("pdf", "said"),
    [
        (b"", "not a PDF that can be read"),
        (b"%PDF-1.7\nnothing more", "not a PDF that can be read"),
        (pdf_of(["", ""]), "no text on its 2 pages"),
        (pdf_of(["cut"])[:200], "not a PDF that can be read"),
    ],
)
def test_pdf_without_text_is_refused_with_the_reason(client, pdf, said):
    pytest.importorskip("pypdf")
    response = client.post("/page/text", content=pdf, headers=PDF)
    assert response.status_code == 400
    assert said in message_of(response)


@pytest.mark.parametrize("media_type", ["text/html", "application/msword", "application/pdfx", ""])
def test_other_types_are_refused_by_name(client, media_type):
    response = client.post("/page/text", content=pdf_of(["x"]), headers={"Content-Type": media_type})
    assert response.status_code == 415
    assert (media_type or "of no stated type") in message_of(response)


def test_pdf_above_the_limit_of_bodies_is_refused():
    pdf = pdf_of(["x"])
    client = TestClient(build_api({}, ServeConfig(max_body_bytes=len(pdf) - 1), health=no_models))
    response = client.post("/page/text", content=pdf, headers=PDF)
    assert (response.status_code, f"serve.max_body_bytes is {len(pdf) - 1}" in message_of(response)) == (413, True)


def test_page_is_open_and_reading_a_pdf_needs_a_key():
    api = build_api({}, ServeConfig(), health=no_models, key_digests=digests(["a-key-of-some-length"]))
    client = TestClient(api)
    assert {client.get(path).status_code for path in ("/", "/page.css", "/page.js")} == {200}
    assert client.post("/page/text", content=b"%PDF", headers=PDF).status_code == 401
    with_key = {**PDF, "Authorization": "Bearer a-key-of-some-length", "Content-Type": "text/plain"}
    assert client.post("/page/text", content=b"%PDF", headers=with_key).status_code == 415


def test_missing_package_is_named(client, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    response = client.post("/page/text", content=pdf_of(["x"]), headers=PDF)
    assert (response.status_code, response.json()["error"]["type"]) == (501, "server_error")
    assert "pip install 'longalign_ray[pdf]'" in message_of(response)


@pytest.mark.parametrize(
    ("program", "said", "status"),
    [
        ("import time; time.sleep(60)", "not read within 0.5 seconds", -9),
        ("import os; os.abort()", "ended with status -6", -6),
    ],
)
def test_a_reader_that_hangs_or_dies_is_ended_and_named(client, monkeypatch, tmp_path, program, said, status):
    stuck = tmp_path / "stuck.py"
    stuck.write_text(program, encoding="utf-8")
    monkeypatch.setattr(document_page.pdf_reader, "__file__", str(stuck))
    monkeypatch.setattr(document_page, "MAX_PDF_SECONDS", 0.5 if "sleep" in program else 60)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    started = []
    start = asyncio.create_subprocess_exec

    async def watched(*args: Any, **settings: Any) -> Any:
        started.append(await start(*args, **settings))
        return started[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", watched)
    response = client.post("/page/text", content=b"%PDF", headers=PDF)
    assert (response.status_code, said in message_of(response)) == (400, True)
    assert [process.returncode for process in started] == [status]


def test_memory_of_the_reader_is_limited(client, monkeypatch):
    pytest.importorskip("pypdf")
    assert client.post("/page/text", content=pdf_of(["x"]), headers=PDF).json()["text"] == "x"
    monkeypatch.setattr(document_page, "MAX_PDF_MEMORY_BYTES", 8 * 2**20)  # less than the parser itself takes
    response = client.post("/page/text", content=pdf_of(["x"]), headers=PDF)
    assert (response.status_code, "more than 8 MiB of memory" in message_of(response)) == (400, True)


def test_text_is_limited(monkeypatch):
    pytest.importorskip("pypdf")
    monkeypatch.setattr(pdf_reader, "MAX_TEXT_CHARS", 6)
    assert pdf_reader.read(pdf_of(["abc", "def"]))["text"] == "abc\n\ndef"
    assert pdf_reader.read(pdf_of(["abc", "defg"])) == {"error": "more than 6 characters of text; split it"}


def test_two_pdfs_are_read_at_once_and_the_next_waits(monkeypatch, tmp_path):
    counting = tmp_path / "counting.py"
    counting.write_text(
        "import json, os, pathlib, time\n"
        f"mine = pathlib.Path({str(tmp_path)!r}, f'{{os.getpid()}}.run')\n"
        "mine.touch()\n"
        "time.sleep(0.5)\n"
        "print(json.dumps({'text': len(list(mine.parent.glob('*.run')))}))\n"
        "mine.unlink()\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(document_page.pdf_reader, "__file__", str(counting))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())

    async def upload() -> list[int]:
        transport = httpx.ASGITransport(build_api({}, ServeConfig(), health=no_models))
        async with httpx.AsyncClient(transport=transport, base_url="http://page", timeout=60) as client:
            made = await asyncio.gather(*(client.post("/page/text", content=b"%PDF", headers=PDF) for _ in range(4)))
        return [response.json()["text"] for response in made]

    assert max(asyncio.run(upload())) == 2


def test_halves_of_surrogate_pairs_become_text():
    assert pdf_reader._whole_characters("a\ud83d\ude00b\ud83dc") == "a\U0001f600b\ufffdc"
