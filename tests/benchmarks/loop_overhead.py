"""What the training loop and Ray Train cost over a bare DeepSpeed loop, and how long a rank waits for data. Markdown.

    python -m tests.benchmarks.loop_overhead [--rounds 3] [--layers 4]

Two ranks under Ray Train and ZeRO-3 on this machine, the quickstart's packs and layers of SmolLM2-135M's shape in
float32. The bare loop has its batches in memory and only calls the engine; both take turns, and medians are shown.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def work(settings: dict[str, Any]) -> None:
    import ray.train
    import torch

    from longalign_ray.config import TrainConfig
    from longalign_ray.data.packed import PackReader
    from longalign_ray.data.plan import StepPlan
    from longalign_ray.train.batch import dummy_pack, to_batch
    from longalign_ray.train.engine import TrainEngine
    from longalign_ray.train.loop import StepMetrics, train_loop
    from tests.benchmarks.packed_vs_padded import build

    torch.set_num_threads(1)
    plan, config = StepPlan.load(Path(settings["plan"])), TrainConfig(heldout_every=0, checkpoint_every=10**9)
    engine = TrainEngine(build(settings["layers"]), config, dtype="float32", micro_steps=plan.shape[1])
    packs = PackReader(plan, store_dir=Path(settings["store"]), packed_dir=Path("none"))
    steps, micro_steps, _ = plan.shape
    rank = ray.train.get_context().get_world_rank()
    ready = [
        [to_batch(packs.pack(step, micro, rank) or dummy_pack(), loss="sequence") for micro in range(micro_steps)]
        for step in range(steps)
    ]

    def bare() -> None:
        for step, batches in enumerate(ready):
            for number, batch in enumerate(batches):
                total = float(plan.num_sequences[step])
                engine.forward_backward(batch, step_total=total, last=number == micro_steps - 1)
            engine.step(1e-6)

    waits: list[float] = []

    def loop() -> None:
        def on_step(metrics: StepMetrics) -> None:
            waits.append(metrics.data_seconds / metrics.seconds)

        train_loop(engine, packs, config, on_step=on_step)

    bare()  # warms up
    seconds: dict[str, list[float]] = {"bare": [], "loop": []}
    for _ in range(settings["rounds"]):
        for name, run in (("bare", bare), ("loop", loop)):
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    if rank == 0:
        result = {name: float(np.median(some)) for name, some in seconds.items()} | {"wait": float(np.median(waits))}
        Path(settings["result"]).write_text(json.dumps(result), encoding="utf-8")


def main() -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from tests.benchmarks.packed_vs_padded import packed_plan, quickstart_store

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = quickstart_store(Path(scratch), 60)
        plan = packed_plan(store, capacity=1_536, world_size=2)
        plan.save(Path(scratch) / "plan.npz")
        ray.init(num_cpus=3, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        files = {"plan": "plan.npz", "store": "store", "result": "result.json"}
        TorchTrainer(
            work,
            train_loop_config={"rounds": arguments.rounds, "layers": arguments.layers}
            | {name: str(Path(scratch) / file) for name, file in files.items()},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(name="overhead", storage_path=scratch),
        ).fit()
        result = json.loads((Path(scratch) / "result.json").read_text(encoding="utf-8"))
        ray.shutdown()
    print(f"{plan.num_steps} steps of {plan.shape[1]} micro-steps, 2 ranks\n")
    print("| bare DeepSpeed loop, s | training loop under Ray Train, s | overhead | wait for data, of a step |")
    print("|---|---|---|---|")
    over = result["loop"] / result["bare"] - 1
    print(f"| {result['bare']:.1f} | {result['loop']:.1f} | {over:.1%} | {result['wait']:.2%} |")


if __name__ == "__main__":
    main()
