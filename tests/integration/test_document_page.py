"""The page in a browser, before the real application over a tiny model. Skipped without Playwright and Chromium."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from longalign_ray.api_keys import digests
from longalign_ray.config import ServeConfig
from longalign_ray.errors import ServingError
from tests.unit.serve.test_api import BrokenEngine
from tests.unit.serve.test_document_page import pdf_of

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH, or its path in CHROMIUM")

DOCUMENT = "The lighthouse of Marlow Bay was <b>repainted</b> in 1911.\n" * 20
KEY = "a-key-of-some-length"
DROP = """([name, type, base64]) => {
  const transfer = new DataTransfer();
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  transfer.items.add(new File([bytes], name, {type}));
  document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
}"""


@contextmanager
def listening(api: Any) -> Iterator[str]:
    """URL of an application on 127.0.0.1."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    uvicorn_server = uvicorn.Server(uvicorn.Config(api, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        uvicorn_server.should_exit = True
        thread.join(timeout=30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path) -> Iterator[tuple[str, str, Any]]:
    """URL of the application, URL of one that wants a key, engine of `tiny`, which is chosen at first.

    Beside it stands a model that fails.
    """
    from longalign_ray.serve.answer import served_model
    from longalign_ray.serve.api import build_api
    from longalign_ray.serve.transformers_engine import TransformersEngine

    async def health() -> dict[str, bool]:
        return dict.fromkeys(models, True)

    engine = TransformersEngine(tiny_model_dir, dtype="float32", prefill_chunk=256)
    tiny = served_model("tiny", engine, tiny_model_dir, chat_template=None)
    broken = BrokenEngine(ServingError("the replica was lost"), after_tokens=3)
    models = {"failing": dataclasses.replace(tiny, name="failing", engine=broken), "tiny": tiny}
    config = ServeConfig(max_prompt_tokens=3_500, max_output_tokens=2_000)
    with (
        listening(build_api(models, config, health=health)) as url,
        listening(build_api(models, config, health=health, key_digests=digests([KEY]))) as guarded_url,
    ):
        yield url, guarded_url, engine
    engine.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: tuple[str, str, Any]) -> Iterator[Any]:
    """The page, loaded; what the browser's console says of scripts and policies at fault fails the test."""
    page = browser.new_page()
    page.set_default_timeout(60_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None)
    page.goto(server[0])
    sync_api.expect(page.locator("#model")).to_have_value("tiny")
    yield page
    page.close()
    assert faults == []


def stats_of(engine: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:  # Playwright's loop runs in this thread
        return pool.submit(asyncio.run, engine.stats()).result()


def drop(page: Any, name: str, content: bytes, *, media_type: str = "") -> None:
    page.evaluate(DROP, [name, media_type, base64.b64encode(content).decode()])


def ask(page: Any, question: str, *, max_tokens: int) -> None:
    page.fill("#max-tokens", str(max_tokens))
    page.fill("#question", question)
    page.press("#question", "Control+Enter")


def answered(page: Any, question: str) -> Any:
    """The turn of `question`, once the page says that it has ended."""
    turn = page.locator(".turn").first
    assert turn.locator("h3").inner_text() == question
    page.wait_for_selector("#ask:enabled")
    return turn


def test_questions_on_a_dropped_document(page, server):
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    drop(page, "bay.md", DOCUMENT.encode())
    page.wait_for_selector("#held-text")
    assert page.locator("#held-text").inner_text().strip() == DOCUMENT.strip()  # `<b>` as it is written
    assert page.locator("#document-size").inner_text() == f"{len(DOCUMENT):,} characters"

    ask(page, "When was it <i>repainted</i>?", max_tokens=12)
    turn = answered(page, "When was it <i>repainted</i>?")
    body = {**sent[0], "stream": False, "stream_options": None}
    whole = httpx.post(f"{server[0]}/v1/chat/completions", json=body, timeout=60).json()
    answer = whole["choices"][0]["message"]["content"]
    assert turn.locator(".answer").evaluate("node => node.textContent") == answer
    chips = turn.locator(".chip").all_inner_texts()
    assert chips[0] == "model tiny"
    assert f"prompt tokens {whole['usage']['prompt_tokens']:,}" in chips
    assert "answer tokens 12" in chips
    assert any(chip.startswith("first token after ") for chip in chips)
    assert any(chip.startswith("tokens/s ") for chip in chips)
    assert "cut at the longest answer" in chips

    ask(page, "Who did it?", max_tokens=4)
    answered(page, "Who did it?")
    page.uncheck("#keep")
    ask(page, "What stands there?", max_tokens=4)
    cached = answered(page, "What stands there?").locator(".chip", has_text="of them cached").inner_text()
    assert int(cached.split()[-1].replace(",", "")) > len(DOCUMENT)  # a token a byte: the document was not read again
    first, kept, alone = (body["messages"] for body in sent)
    assert first == [{"role": "user", "content": f"{DOCUMENT}\n\nWhen was it <i>repainted</i>?"}]
    assert kept == [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "Who did it?"}]
    assert alone == [{"role": "user", "content": f"{DOCUMENT}\n\nWhat stands there?"}]
    assert page.locator(".turn b:not(.chip b), .turn i").count() == 0


def test_a_key_is_asked_for_and_kept_in_the_page_alone(page, server):
    assert page.locator("#key").is_hidden()
    page.goto(server[1])
    sync_api.expect(page.locator("#key")).to_be_focused()
    assert page.locator("#model-error").inner_text().startswith("no valid API key")
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    sync_api.expect(page.locator("#model")).to_have_value("tiny")
    assert page.locator("#model-error").is_hidden()
    ask(page, "Hello?", max_tokens=4)
    assert "answer tokens 4" in answered(page, "Hello?").locator(".chip").all_inner_texts()
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.reload()
    sync_api.expect(page.locator("#key")).to_be_focused()
    assert page.input_value("#key") == ""


def test_escape_stops_the_answer_on_the_server_too(page, server):
    engine = server[2]
    before = stats_of(engine)
    ask(page, "Tell me everything", max_tokens=2_000)
    sync_api.expect(page.locator(".answer")).to_have_text(re.compile(".{5}", re.DOTALL), timeout=60_000)
    assert page.locator("#turns").get_attribute("aria-busy") == "true"
    page.keyboard.press("Escape")
    turn = answered(page, "Tell me everything")
    assert turn.locator(".chip").last.inner_text().startswith("stopped after ")
    assert page.locator("#turns").get_attribute("aria-busy") == "false"
    deadline = time.monotonic() + 30
    while stats_of(engine).cancelled == before.cancelled and time.monotonic() < deadline:
        time.sleep(0.05)
    after = stats_of(engine)
    assert (after.cancelled, after.active) == (before.cancelled + 1, 0)


def test_the_server_s_refusal_of_a_document_too_long_for_it(page):
    text = "All work and no play makes a dull text. " * 12_500
    drop(page, "long.txt", text.encode())
    page.wait_for_selector(".left-out")
    assert page.locator("#document-size").inner_text() == "500,000 characters"
    assert page.locator("#held-text").evaluate("node => node.textContent.length") < 5_000
    ask(page, "What is it about?", max_tokens=4)
    turn = answered(page, "What is it about?")
    said = turn.get_by_role("alert").inner_text()
    assert said.startswith("the prompt has 500")
    assert said.endswith("serve.max_prompt_tokens is 3500; shorten it")
    assert page.input_value("#question") == "What is it about?"  # to be asked again


def test_a_failure_in_the_middle_of_an_answer(page):
    page.select_option("#model", "failing")
    ask(page, "Well?", max_tokens=8)
    turn = answered(page, "Well?")
    assert turn.get_by_role("alert").inner_text() == "the replica was lost"
    assert turn.locator(".answer").inner_text() == "IJK"  # what had come stays to be read
    assert turn.locator(".chip").first.inner_text() == "model failing"
    page.select_option("#model", "tiny")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "And now?", max_tokens=4)
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "And now?"}]  # not as if it were whole
    answered(page, "And now?")


def test_a_long_paste_is_held_beside_the_text_field(page):
    page.fill("#document", "before ")
    page.evaluate("document.getElementById('document').focus()")
    page.keyboard.press("End")
    page.keyboard.insert_text("x" * 25_000)
    assert page.locator("#held-name").inner_text() == "Pasted text"
    assert page.locator("#document-size").inner_text() == "25,007 characters"
    page.click("#remove")
    assert page.evaluate("document.activeElement.id") == "document"
    assert page.locator("#document-size").inner_text() == ""


def test_files_that_are_no_text_are_refused_by_name(page):
    drop(page, "photo.png", b"\x89PNG\r\n\x1a\n\x00\x00")
    page.wait_for_selector("#document-error:not([hidden])")
    said = page.locator("#document-error").inner_text()
    assert said == "photo.png: neither a PDF nor text in UTF-8; save it as txt, md or pdf"
    drop(page, "latin.txt", "café".encode("latin-1"))
    sync_api.expect(page.locator("#document-error")).to_contain_text("latin.txt: neither", timeout=60_000)
    drop(page, "utf16.txt", "café".encode("utf-16"))
    sync_api.expect(page.locator("#held-text")).to_have_text("café", timeout=60_000)
    assert page.locator("#document-error").is_hidden()
    drop(page, "broken.pdf", b"%PDF-1.7")
    sync_api.expect(page.locator("#document-error")).to_contain_text("broken.pdf: ", timeout=60_000)


def test_a_dropped_pdf_becomes_text(page):
    pytest.importorskip("pypdf")
    drop(page, "bay.pdf", pdf_of(["The lighthouse", ""]), media_type="application/pdf")
    page.wait_for_selector("#held-text")
    assert page.locator("#held-text").inner_text() == "The lighthouse"
    size = "14 characters; 2 pages, 1 of them without text, such as scans"
    assert page.locator("#document-size").inner_text() == size
    drop(page, "photo.png", b"\x89PNG\r\n\x1a\n\x00\x00")  # refused, so the document stays
    page.wait_for_selector("#document-error:not([hidden])")
    assert page.locator("#held-name").inner_text() == "bay.pdf"
    assert page.locator("#document-size").inner_text() == size


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_fits_a_phone_and_is_reached_by_keyboard(browser, server, scheme):
    page = browser.new_page(viewport={"width": 360, "height": 700}, color_scheme=scheme)
    page.goto(server[0])
    sync_api.expect(page.locator("#model")).to_have_value("tiny")
    drop(page, "a-name-that-has-no-place-to-break_" * 4 + ".txt", b"w" * 3_000)
    page.wait_for_selector("#held-text")
    ask(page, "v" * 200, max_tokens=4)
    answered(page, "v" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator("#turns").get_attribute("aria-live") == "polite"
    for role, name in (
        ("textbox", "Question"),
        ("combobox", "Model"),
        ("spinbutton", "Longest answer, tokens"),
        ("spinbutton", "Temperature"),
    ):
        assert page.get_by_role(role, name=name, exact=True).count() == 1
    assert page.get_by_role("checkbox", name="Keep the conversation").is_checked()
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
        width = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert page.evaluate("document.activeElement === document.body") or width == "2px"
    assert reached >= {"remove", "choose", "held-text", "question", "ask", "model", "max-tokens", "temperature", "keep"}
    page.close()
