"""The text of a PDF, read in a process of its own, which a hostile file may exhaust.

    python pdf_reader.py MAX_MEMORY_BYTES < PDF > JSON

It is run by its path and imports nothing of the package, so that it starts fast.
"""

from __future__ import annotations

import io
import json
import resource
import sys
from typing import Any

MAX_TEXT_CHARS = 16_000_000  # some 4 million tokens


def read(pdf: bytes) -> dict[str, Any]:
    """`text`, `num_pages`, `num_empty_pages`; or `error`, which says why there is no text."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError

    try:
        pages = PdfReader(io.BytesIO(pdf)).pages
        texts: list[str] = []
        num_chars = 0
        for page in pages:
            texts.append(_whole_characters(page.extract_text()).strip())
            num_chars += len(texts[-1])
            if num_chars > MAX_TEXT_CHARS:
                return {"error": f"more than {MAX_TEXT_CHARS} characters of text; split it"}
    except FileNotDecryptedError:
        return {"error": "encrypted with a password; save it without one"}
    except DependencyError as error:
        return {"error": f"{error}; install that on the server, or paste the text"}
    except Exception as error:  # a broken PDF makes the parser fail in any way; nothing depends on it here
        return {"error": f"not a PDF that can be read ({type(error).__name__}: {error or 'no message'})"}
    num_empty = texts.count("")
    if num_empty == len(texts):
        return {"error": f"no text on its {len(texts)} pages; scanned pages need text recognition first"}
    return {"text": "\n\n".join(filter(None, texts)), "num_pages": len(texts), "num_empty_pages": num_empty}


def _whole_characters(text: str) -> str:
    """`text` with the halves of surrogate pairs joined, and U+FFFD for a half that stands alone."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


if __name__ == "__main__":
    max_memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
    json.dump(read(sys.stdin.buffer.read()), sys.stdout)
