"""Wall time and memory of `make quickstart` in a fresh clone with no environment and no cache.

Memory is the proportional set size (PSS) of the command and everything it started, sampled once a second: pages that
processes share count once. Run: python -m tests.benchmarks.quickstart [-- make arguments]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
STAGES = ("construct", "prepare", "train", "export", "evaluate")


class MemoryWatch(threading.Thread):
    """Highest sum of PSS over a process and its descendants, by stage of the run, in GB."""

    def __init__(self, pid: int, run_dir: Path):
        super().__init__(daemon=True)
        self.root, self.run_dir = psutil.Process(pid), run_dir
        self.peaks: dict[str, float] = {}
        self.finished = threading.Event()

    def run(self) -> None:
        while not self.finished.wait(1.0):
            done = sum((self.run_dir / stage / "manifest.json").exists() for stage in STAGES)
            stage = STAGES[done] if self.run_dir.exists() and done < len(STAGES) else "set-up and report"
            self.peaks[stage] = max(self.peaks.get(stage, 0.0), self._total())

    def _total(self) -> float:
        total = 0
        with suppress(psutil.NoSuchProcess):
            for process in [self.root, *self.root.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    total += process.memory_full_info().pss
        return total / 1e9


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = {**os.environ, "XDG_CACHE_HOME": f"{scratch}/cache"}
        run_dir = clone / "runs" / "quickstart"
        started = time.perf_counter()
        process = subprocess.Popen(["make", "quickstart", *sys.argv[1:]], cwd=clone, env=environment)
        watch = MemoryWatch(process.pid, run_dir)
        watch.start()
        code = process.wait()
        total = time.perf_counter() - started
        watch.finished.set()
        watch.join()
        if code:
            raise SystemExit(f"make quickstart ended with {code}")
        print("\n| part of `make quickstart` | seconds | peak memory, GB |\n|---|---|---|")
        in_stages = 0.0
        for stage in STAGES:
            seconds = json.loads((run_dir / stage / "manifest.json").read_text())["seconds"]
            in_stages += seconds
            print(f"| {stage} | {seconds:.0f} | {watch.peaks.get(stage, 0.0):.1f} |")
        rest = watch.peaks.get("set-up and report", 0.0)
        print(f"| installation, model conversion, report | {total - in_stages:.0f} | {rest:.1f} |")
        print(f"| **in all** | **{total:.0f}** | **{max(watch.peaks.values()):.1f}** |")


if __name__ == "__main__":
    main()
