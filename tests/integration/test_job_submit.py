"""The whole pipeline as a Ray job: a cluster with token authentication, `ray job submit`, and its report."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from longalign_ray.cli import main
from longalign_ray.logs import read_metrics
from longalign_ray.run_dir import Manifest, RunDir
from tests.conftest import SHARED_DATA
from tests.integration.recipes import write_corpus

REAL_FILES = ("chat/self_instruct.jsonl", "long_sft/qmsum.jsonl")
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running head: its dashboard's address, an environment with the token, and one without."""

    address: str
    environment: dict[str, str]
    environment_without_token: dict[str, str]

    def submit(self, *command: str, token: bool = True, timeout: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "ray", "job", "submit", f"--address={self.address}", "--working-dir", str(ROOT), "--", *command],
            env=self.environment if token else self.environment_without_token,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def get(self, path: str, *, method: str = "GET") -> str:
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        return httpx.request(method, self.address + path, headers=headers, timeout=60).raise_for_status().text


def free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("home")  # no token file of the user's
    without_token = {name: value for name, value in os.environ.items() if name not in TOKEN_VARIABLES} | {
        "HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # the job's `python` is the one of the head's PATH
        "NO_COLOR": "1",
        "RAY_worker_niceness": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "OMP_NUM_THREADS": "1",
    }
    environment = without_token | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    port, dashboard, client, agent, metrics = free_ports(5)
    log = home / "head.log"
    with short_directory() as scratch, log.open("w", encoding="utf-8") as output:
        head = subprocess.Popen(
            [
                *(BIN / "ray", "start", "--head", "--block", "--disable-usage-stats"),
                *("--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={scratch}"),
                *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
                *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
                *(f"--metrics-export-port={metrics}", "--num-cpus=6", "--object-store-memory=200000000"),
            ],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{dashboard}"
            wait_for(address, environment["RAY_AUTH_TOKEN"], head, log)
            yield Cluster(address, environment, without_token)
        finally:
            end(head)


@contextmanager
def short_directory() -> Iterator[str]:
    """A directory with a short name: Ray's sockets lie in it, and their paths may have 107 characters at most."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        yield directory


def wait_for(address: str, token: str, head: subprocess.Popen[bytes], log: Path, *, seconds: float = 90) -> None:
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + seconds
    while True:
        if head.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the head did not start: {log.read_text(encoding='utf-8')[-4_000:]}")
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)


def end(head: subprocess.Popen[bytes]) -> None:
    """Ends the head and what it started: all of it is in the head's own process group."""
    head.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        head.wait(timeout=30)
    with suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait(timeout=30)


def test_submit_without_the_token_is_refused(cluster: Cluster) -> None:
    refused = cluster.submit("python", "-c", "print('ran')", token=False, timeout=60)
    assert refused.returncode != 0
    assert "Unauthorized" in refused.stdout + refused.stderr
    assert "submitted successfully" not in refused.stdout
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.address}/api/jobs/", timeout=10)


def test_bad_recipe_fails_the_job_with_its_message(cluster: Cluster) -> None:
    failed = cluster.submit("python", "jobs/pipeline.py", "jobs/recipes/tiny.yaml", "train.zero_stge=3", timeout=120)
    assert failed.returncode != 0
    assert "did you mean 'zero_stage'?" in failed.stdout
    assert "exit code 2" in failed.stdout


@pytest.mark.slow
def test_written_serve_config_is_deployed(cluster: Cluster, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Through the cluster's REST API, as `serve deploy` does it, and with the token."""
    keys, recipe, file, [port] = tmp_path / "keys", tmp_path / "recipe.yaml", tmp_path / "serve.yaml", free_ports(1)
    shutil.copytree(tiny_model_dir, tmp_path / "run" / "model")
    keys.write_text("a-key-of-the-tests-01")
    recipe.write_text(f"run_dir: {tmp_path}/run\nmodel: {{path: {tiny_model_dir}, dtype: float32}}")
    settings = [f"serve.port={port}", f"serve.api_keys=file:{keys}"]
    assert main(["serve", str(recipe), *settings, "--write-config", str(file)]) == 0
    deploy = [BIN / "serve", "deploy", str(file), f"--address={cluster.address}"]
    done = subprocess.run(deploy, env=cluster.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

    root = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 240
    while not is_healthy(f"{root}/health"):
        assert time.monotonic() < deadline, cluster.get("/api/serve/applications/")
        time.sleep(0.5)
    body = {"model": "aligned", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 3, "temperature": 0}
    assert httpx.post(f"{root}/v1/chat/completions", json=body).status_code == 401
    headers = {"Authorization": "Bearer a-key-of-the-tests-01"}
    made = httpx.post(f"{root}/v1/chat/completions", json=body, headers=headers, timeout=60).json()
    assert made["usage"]["completion_tokens"] == 3
    cluster.get("/api/serve/applications/", method="DELETE")  # as `serve shutdown` does


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.slow
def test_pipeline_as_a_job(cluster: Cluster, tiny_model_dir: Path, tmp_path: Path) -> None:
    """On real conversations, short ones and meetings; where they are missing, on written ones."""
    run_dir, [port] = RunDir(tmp_path / "run"), free_ports(1)
    real = [SHARED_DATA / name for name in REAL_FILES]
    paths = real if SHARED_DATA.is_dir() else [write_corpus(tmp_path / "notes.jsonl", 60)]
    done = cluster.submit(
        *("python", "jobs/pipeline.py", "jobs/recipes/tiny.yaml", f"run_dir={run_dir.root}", f"serve.port={port}"),
        *(f"model.path={tiny_model_dir}", f"corpus.paths=[{','.join(map(str, paths))}]"),
        *("data.too_long=cut_right", "data.heldout_fraction=0.02"),
        timeout=420,
    )
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:]
    assert "needle accuracy" in done.stdout

    manifests = {stage: Manifest.load(run_dir.manifest(stage)) for stage in ("prepare", "train", "export", "evaluate")}
    assert all(manifest and manifest.counts for manifest in manifests.values())
    prepared = manifests["prepare"]
    assert prepared is not None
    records = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    counts, dropped = prepared.counts, dict(prepared.dropped_by_reason)
    beyond_max_steps = dropped.pop("beyond_max_steps")
    assert counts["records"] == records
    assert counts["examples"] + sum(dropped.values()) == records
    assert counts["planned"] + counts["heldout"] + beyond_max_steps == counts["examples"]
    if paths == real:
        assert records == 466
        assert dropped["no_target_left"] >= 70  # meetings whose first answer lies beyond 2,048 bytes

    losses = [row["loss"] for row in read_metrics(run_dir.metrics)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert (run_dir.model / "model.safetensors").is_file()
    text = run_dir.report_html.read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert json.loads(run_dir.report_json.read_text(encoding="utf-8"))["heldout"].keys() == {"base", "aligned"}
