"""The whole pipeline as a Ray job: a cluster with token authentication, `ray job submit`, and its report."""

from __future__ import annotations

import json
import os
import secrets
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

import pytest

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


def write_corpus(path: Path, *, num_conversations: int = 60) -> None:
    """Short conversations of one or two turns, each about its own number."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_conversations):
            messages = [
                {
                    "role": "user",
                    "content": f"Note {number}: " + "the meadow is green. " * (1 + number % 12) + "Which?",
                },
                {"role": "assistant", "content": f"It is note {number}."},
            ]
            if number % 3 == 0:
                messages += [
                    {"role": "user", "content": f"And what comes after {number}?"},
                    {"role": "assistant", "content": f"{number + 1} comes after {number}."},
                ]
            file.write(json.dumps({"id": f"note-{number}", "messages": messages}) + "\n")


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


def test_pipeline_as_a_job(cluster: Cluster, tiny_model_dir: Path, tmp_path: Path) -> None:
    corpus, run_dir, [port] = tmp_path / "notes.jsonl", tmp_path / "run", free_ports(1)
    write_corpus(corpus)
    done = cluster.submit(
        *("python", "jobs/pipeline.py", "jobs/recipes/tiny.yaml", f"run_dir={run_dir}", f"serve.port={port}"),
        *(f"model.path={tiny_model_dir}", f"corpus.paths=[{corpus}]"),
        timeout=420,
    )
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:]
    assert (run_dir / "report.html").stat().st_size > 1_000
    for stage in ("prepare", "train", "export", "evaluate"):
        manifest = json.loads((run_dir / stage / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["counts"], stage
    assert (run_dir / "model" / "model.safetensors").is_file()
    losses = [json.loads(line)["loss"] for line in (run_dir / "train" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
