"""Fixtures that more than one test file uses."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from longalign_ray.stages import set_ray_environment

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would wait for each other
os.environ.setdefault("OMP_THREAD_LIMIT", "1")  # a rank that has three logical CPUs would set three
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # DeepSpeed's Muon has each rank import torch's compiler: 4 s of CPU
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")  # 30 s for a rank that a test has stopped
os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")  # before Ray starts, so that its workers have them too
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
set_ray_environment()

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests first, as a process that has begun with integration tests has Ray running; then the longest file."""
    items.sort(key=lambda item: (not item.nodeid.startswith("tests/unit/"), item.path.name != "test_train.py"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout; tests that need it are skipped where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for all tests of a process that need it; its four CPUs are logical."""
    import ray

    ray.init(num_cpus=4, include_dashboard=False, logging_level=logging.WARNING, object_store_memory=400_000_000)
    yield
    ray.shutdown()
