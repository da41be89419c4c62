"""The tiny model behind its engine, once for all tests of the HTTP layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from longalign_ray.serve.answer import ServedModel, served_model
from longalign_ray.serve.transformers_engine import TransformersEngine


@pytest.fixture(scope="package")
def engine(tiny_model_dir: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(tiny_model_dir, dtype="float32", prefill_chunk=16)
    yield engine
    engine.close()


@pytest.fixture(scope="package")
def model(engine: TransformersEngine, tiny_model_dir: Path) -> ServedModel:
    return served_model("tiny", engine, tiny_model_dir, chat_template=None)
