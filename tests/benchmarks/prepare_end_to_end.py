"""CPU seconds and memory of the whole `longalign prepare`, all its processes together, for a corpus and for ten of it.

The corpus is that of prepare_cost.py: 10,000 short chats and 200 long documents; "x 10" has every one ten times. The
yardstick is `tokenizers.Tokenizer.encode_batch` with offsets on the same texts in one thread. What Ray, the imports of
its workers and the driver cost without data is the row of one conversation. CPU time and memory are sampled four times
a second; "anonymous" leaves out the pages of memory-mapped files, which the kernel drops when it needs room.
Run: python -m tests.benchmarks.prepare_end_to_end [--times 10]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import psutil

from longalign_ray.data.store import ExampleIndex
from longalign_ray.data.template import load_tokenizer
from longalign_ray.model_source import local_model_dir
from longalign_ray.run_dir import Manifest, RunDir
from tests.benchmarks.prepare_cost import cpu_seconds, write_corpus
from tests.conftest import SHARED_DATA

MODEL = "bundled:smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class Use:
    """What a command and all its descendants used."""

    wall_seconds: float
    cpu_seconds: dict[str, float]
    """Of the driver, the workers, and Ray's own processes."""
    driver_peak: int
    """Bytes of anonymous memory, as the next."""
    driver_peak_rss: int
    """With the pages of mapped files."""
    worker_peak: int
    """The largest worker's."""
    worker_peak_rss: int

    @property
    def peaks(self) -> dict[str, int]:
        """By the heads of the table's columns."""
        return {
            "driver, MB anonymous": self.driver_peak,
            "driver, MB with mapped files": self.driver_peak_rss,
            "a worker, MB anonymous": self.worker_peak,
            "a worker, MB with mapped files": self.worker_peak_rss,
        }


def watch(command: list[str], log: Path) -> Use:
    """Runs the command to its end; raises SystemExit with its output where it fails."""
    cpu: dict[tuple[str, int, float], float] = {}
    peaks: dict[str, int] = defaultdict(int)
    started = time.perf_counter()
    with log.open("w") as out:
        root = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while root.poll() is None:
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                    times, memory = process.cpu_times(), process.memory_info()
                    name = "driver" if process.pid == root.pid else _kind(process)
                    cpu[name, process.pid, process.create_time()] = times.user + times.system
                    peaks[name] = max(peaks[name], memory.rss - memory.shared)
                    peaks[f"{name} rss"] = max(peaks[f"{name} rss"], memory.rss)
            time.sleep(0.25)
    if root.returncode:
        raise SystemExit(log.read_text())
    seconds = time.perf_counter() - started
    spent: dict[str, float] = defaultdict(float)
    for (name, _, _), used in cpu.items():
        spent[name] += used
    return Use(seconds, spent, *(peaks[name] for name in ("driver", "driver rss", "worker", "worker rss")))


def _kind(process: psutil.Process) -> str:
    """A worker changes its command line to `ray::` and what it runs; before, it imports."""
    line = process.cmdline()
    return "worker" if line and (line[0].startswith("ray::") or "default_worker.py" in " ".join(line)) else "ray"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    times = parser.parse_args().times
    if not SHARED_DATA.is_dir():
        print(f"left out: no real data at {SHARED_DATA}")
        return
    model_dir = local_model_dir(MODEL)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus.jsonl"
        texts = write_corpus(corpus, load_tokenizer(model_dir))
        core = load_tokenizer(model_dir).backend_tokenizer

        def encode() -> None:
            for first in range(0, len(texts), 256):
                core.encode_batch(texts[first : first + 256], add_special_tokens=False)

        yardstick = min(cpu_seconds(encode) for _ in range(2))
        texts.clear()
        whole = corpus.read_bytes()
        corpora = {
            "one conversation": (whole[: whole.index(b"\n") + 1], 0),
            "x 1": (whole, 1),
            f"x {times}": (whole * times, times),
        }
        columns = [
            "corpus",
            "examples",
            "tokens",
            "wall s",
            "CPU s",
            "of driver",
            "of workers",
            "of Ray",
            "CPU s over encode_batch",
        ]
        columns += Use(0, {}, 0, 0, 0, 0).peaks
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        seconds: list[float] = []
        peaks: list[dict[str, int]] = []
        for number, (name, (text, multiple)) in enumerate(corpora.items()):
            path = Path(scratch) / f"corpus{number}.jsonl"
            path.write_bytes(text)
            run_dir = RunDir(Path(scratch) / f"run{number}")
            settings = [f"run_dir={run_dir.root}", f"corpus.paths=[{path}]", f"model.path={MODEL}", "ray.num_cpus=2"]
            settings += ["data.max_length=131072", "packing.capacity=131072", "packing.packs_per_step=8"]
            settings += ["model.rope={scaling: base, window: 131072}"]  # the model has a shorter window
            use = watch(
                [sys.executable, "-m", "longalign_ray.cli", "prepare", "jobs/recipes/quickstart.yaml", *settings],
                Path(scratch) / "log",
            )
            total = sum(use.cpu_seconds.values())
            seconds.append(total)
            index = ExampleIndex.load(run_dir.store / "index.parquet")
            manifest = Manifest.load(run_dir.manifest("prepare"))
            if manifest is None or manifest.counts["examples"] != len(index):
                raise SystemExit(f"{run_dir.root}: the manifest does not agree with the index")
            ratio = f"{total / (multiple * yardstick):.2f}" if multiple else "-"
            parts = " | ".join(f"{use.cpu_seconds[name]:.1f}" for name in ("driver", "worker", "ray"))
            memory = " | ".join(f"{peak / 1e6:,.0f}" for peak in use.peaks.values())
            peaks.append(use.peaks)
            size = f"{len(index):,} | {index.length.sum():,}"
            print(
                f"| {name} | {size} | {use.wall_seconds:.0f} | {total:.1f} | {parts} | {ratio} | {memory} |", flush=True
            )
        marginal = (seconds[2] - seconds[1]) / ((times - 1) * yardstick)
        print(
            f"\nencode_batch on x 1: {yardstick:.1f} CPU s; from x 1 to x {times}, prepare takes {marginal:.2f} of it"
        )
        grown = ", ".join(f"{name} {(peaks[2][name] - peaks[1][name]) / 1e6:+,.0f}" for name in peaks[1])
        print(f"growth of the peaks from x 1 to x {times}: {grown}")


if __name__ == "__main__":
    main()
