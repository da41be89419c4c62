"""Starting and stopping the Serve application: a taken port, a model that does not load, SIGTERM."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from longalign_ray.config import ServeConfig
from longalign_ray.errors import ServingError

pytestmark = pytest.mark.usefixtures("local_ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_port_in_use_is_named_before_anything_starts(tiny_model_dir: Path) -> None:
    from ray import serve

    from longalign_ray.serve.app import running_app

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(ServingError, match=rf"serve.port = {port} cannot be bound .*serve.port=PORT"),
            running_app({"base": tiny_model_dir}, ServeConfig(port=port), chat_template=None, dtype="float32"),
        ):
            pass
    assert not serve.status().proxies


def test_model_that_does_not_load_is_named_and_serve_is_shut_down(tiny_model_dir: Path, tmp_path: Path) -> None:
    from ray import serve

    from longalign_ray.serve.app import running_app

    broken = shutil.copytree(tiny_model_dir, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    config = ServeConfig(port=free_port(), start_timeout_seconds=120)
    started = time.monotonic()
    with (
        pytest.raises(ServingError, match=r"broken: ModelError: .*broken cannot be loaded for serving"),
        running_app({"broken": broken}, config, chat_template=None, dtype="float32"),
    ):
        pass
    assert time.monotonic() - started < 100
    assert not serve.status().proxies


def test_written_config_stands_for_the_same_application(tiny_model_dir: Path, tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    from longalign_ray.cli import main

    shutil.copytree(tiny_model_dir, tmp_path / "run" / "model")
    keys, recipe, file = tmp_path / "keys", tmp_path / "recipe.yaml", tmp_path / "serve.yaml"
    recipe.write_text(f"run_dir: {tmp_path}/run\nmodel: {{path: {tiny_model_dir}, dtype: float32}}")
    settings = ["port=8123", "num_replicas=[1, 4]", f"api_keys=file:{keys}", "affinity_tokens=64", "drain_seconds=9"]
    settings.append("adapters={tuned: adapters/tuned}")
    assert main(["serve", str(recipe), *(f"serve.{each}" for each in settings), "--write-config", str(file)]) == 0
    written = file.read_text()
    schema = ServeDeploySchema.model_validate(yaml.safe_load(written))
    assert (schema.http_options.host, schema.http_options.port) == ("127.0.0.1", 8_123)
    (application,) = schema.applications
    module, _, function = application.import_path.partition(":")
    build = getattr(importlib.import_module(module), function)
    with pytest.raises(ServingError, match="make the file"):
        build(application.args)
    keys.write_text("a-secret-key-of-the-tests")
    ingress: Any = build(application.args)._bound_deployment
    engine = ingress.init_args[0]["base"]._bound_deployment
    assert engine.init_kwargs["adapters"] == {"tuned": str(Path("adapters/tuned").resolve())}
    assert ingress.init_args[0]["aligned"]._bound_deployment.init_kwargs["adapters"] == {}
    scaling = engine._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (10, 300)
    assert (scaling.metrics_interval_s, scaling.look_back_period_s) == (10, 15)
    assert engine._deployment_config.health_check_period_s == 10
    assert engine._deployment_config.graceful_shutdown_timeout_s == 9
    assert "secret" not in repr(ingress.init_args) + repr(ingress.init_kwargs) + written
    assert len(ingress.init_kwargs["key_digests"]) == 1


def test_serve_forever_ends_with_sigterm_after_what_is_under_way(
    tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from longalign_ray.serve.app import serve_forever

    caplog.set_level("INFO", logger="longalign_ray")
    config = ServeConfig(port=free_port())
    health = f"http://127.0.0.1:{config.port}/health"
    seen: list[int] = []
    events: list[str] = []

    def end_when_ready() -> None:
        deadline = time.monotonic() + 120
        while not seen and time.monotonic() < deadline:
            time.sleep(0.5)
            try:
                if httpx.get(health, timeout=5).status_code == 200:
                    seen.append(200)
            except httpx.HTTPError:
                continue
        while "curl" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.1)
        body = {"model": "base", "messages": [{"role": "user", "content": "What is long context?"}], "stream": True}
        url = health.replace("/health", "/v1/chat/completions")
        try:
            with httpx.stream("POST", url, json={**body, "max_tokens": 600, "temperature": 0}, timeout=60) as stream:
                lines = (line for line in stream.iter_lines() if line)
                events.append(next(lines))
                os.kill(os.getpid(), signal.SIGTERM)
                events.extend(lines)
        finally:
            if not events:
                os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=end_when_ready)
    watcher.start()
    serve_forever({"base": tiny_model_dir}, config, chat_template=None, dtype="float32")
    watcher.join()
    assert seen == [200]
    assert events[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in events[-2]
    assert f"http://127.0.0.1:{config.port}/v1/chat/completions" in caplog.text
    with pytest.raises(httpx.ConnectError):
        httpx.get(health)
