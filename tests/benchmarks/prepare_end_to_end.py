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

    cpu_seconds: float
    wall_seconds: float
    driver_peak: int
    """Bytes of anonymous memory, as the others."""
    worker_peak: int
    """The largest worker's."""
    worker_peak_rss: int
    """With the pages of mapped files."""


def watch(command: list[str], log: Path) -> Use:
    """Runs the command to its end; raises SystemExit with its output where it fails."""
    cpu: dict[tuple[int, float], float] = {}
    peaks: dict[str, int] = defaultdict(int)
    started = time.perf_counter()
    with log.open("w") as out:
        root = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while root.poll() is None:
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                    times = process.cpu_times()
                    cpu[process.pid, process.create_time()] = times.user + times.system
                    memory = process.memory_info()
                    if process.pid == root.pid:
                        peaks["driver"] = max(peaks["driver"], memory.rss - memory.shared)
                    elif process.cmdline()[0].startswith("ray::"):
                        peaks["worker"] = max(peaks["worker"], memory.rss - memory.shared)
                        peaks["worker_rss"] = max(peaks["worker_rss"], memory.rss)
            time.sleep(0.25)
    if root.returncode:
        raise SystemExit(log.read_text())
    seconds = time.perf_counter() - started
    return Use(sum(cpu.values()), seconds, peaks["driver"], peaks["worker"], peaks["worker_rss"])


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
        columns = ["corpus", "examples", "tokens", "wall s", "CPU s", "CPU s over encode_batch"]
        columns += ["driver, MB anonymous", "a worker, MB anonymous", "a worker, MB with mapped files"]
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        seconds = []
        for number, (name, (text, multiple)) in enumerate(corpora.items()):
            path = Path(scratch) / f"corpus{number}.jsonl"
            path.write_bytes(text)
            run_dir = RunDir(Path(scratch) / f"run{number}")
            settings = [f"run_dir={run_dir.root}", f"corpus.paths=[{path}]", f"model.path={MODEL}", "ray.num_cpus=2"]
            settings += ["data.max_length=131072", "packing.capacity=131072", "packing.packs_per_step=8"]
            use = watch(
                [sys.executable, "-m", "longalign_ray.cli", "prepare", "jobs/recipes/quickstart.yaml", *settings],
                Path(scratch) / "log",
            )
            seconds.append(use.cpu_seconds)
            index = ExampleIndex.load(run_dir.store / "index.parquet")
            manifest = Manifest.load(run_dir.manifest("prepare"))
            if manifest is None or manifest.counts["examples"] != len(index):
                raise SystemExit(f"{run_dir.root}: the manifest does not agree with the index")
            ratio = f"{use.cpu_seconds / (multiple * yardstick):.2f}" if multiple else "-"
            peaks = (use.driver_peak, use.worker_peak, use.worker_peak_rss)
            memory = " | ".join(f"{peak / 1e6:,.0f}" for peak in peaks)
            print(
                f"| {name} | {len(index):,} | {index.length.sum():,} | {use.wall_seconds:.0f} | {use.cpu_seconds:.1f} | "
                f"{ratio} | {memory} |",
                flush=True,
            )
        marginal = (seconds[2] - seconds[1]) / ((times - 1) * yardstick)
        print(
            f"\nencode_batch on x 1: {yardstick:.1f} CPU s; from x 1 to x {times}, prepare takes {marginal:.2f} of it"
        )


if __name__ == "__main__":
    main()
