"""Training under Ray Train and DeepSpeed: undisturbed and killed runs give the same losses, with and without a node."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from longalign_ray import stages
from longalign_ray.config import RunConfig
from longalign_ray.data.plan import StepPlan
from longalign_ray.errors import LongAlignError
from longalign_ray.logs import read_metrics
from longalign_ray.run_dir import RunDir
from longalign_ray.train.checkpoint_store import CheckpointStore
from longalign_ray.train.memory import CPU_FIXED
from tests.integration.recipes import write_corpus, write_recipe
from tests.integration.test_corpora import s3, s3_bucket  # noqa: F401  (s3: a fixture)

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = pytest.mark.usefixtures("local_ray")


Prepared = Callable[..., tuple[RunConfig, RunDir]]


@pytest.fixture(scope="module")
def prepared(local_ray: None, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Gives a run that ended with `prepare` in a directory of its own, with settings of `train`."""
    first = tmp_path_factory.mktemp("prepared")
    corpus = {"paths": [str(write_corpus(first / "corpus.jsonl", 150))]}
    stages.prepare(*stages.open_run(write_recipe(first, tiny_model_dir, corpus=corpus)))

    def prepare(directory: Path, **train: object) -> tuple[RunConfig, RunDir]:
        shutil.copytree(first / "run", directory / "run")
        return stages.open_run(write_recipe(directory, tiny_model_dir, corpus=corpus, train=train))

    return prepare


def losses(run_dir: RunDir) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run_dir.metrics)]


def training_ranks() -> list[psutil.Process]:
    """Those of this test's own Ray."""
    return [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()]


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunDir]:
    config, run_dir = prepared(tmp_path_factory.mktemp("undisturbed"))
    stages.train(config, run_dir)
    return config, run_dir


def test_loss_falls_and_every_step_is_recorded(undisturbed: tuple[RunConfig, RunDir]) -> None:
    rows = read_metrics(undisturbed[1].metrics)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert len(rows) >= 8
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert sum(row["num_sequences"] for row in rows) == 150 - 4
    assert all(row["rank_imbalance"] >= 1 for row in rows)


def test_every_step_is_watched(undisturbed: tuple[RunConfig, RunDir]) -> None:
    """The held-out loss after the last step alone, as nothing else is asked for; every number in TensorBoard too."""
    rows = read_metrics(undisturbed[1].metrics)
    assert all(1 <= row["seen_imbalance"] <= 2 and row["data_seconds"] < row["seconds"] for row in rows)
    assert [row["step"] for row in rows if "heldout_loss" in row] == [len(rows) - 1]
    assert list(rows[-1]["heldout_by_length"]) == ["0-4k"]
    assert abs(rows[-1]["heldout_loss"] - rows[-1]["loss"]) < 1
    assert rows[-1]["max_memory_gb"] == pytest.approx(CPU_FIXED / 1e9, rel=0.35)  # the model is tiny
    event_files = list((undisturbed[1].metrics.parent / "tensorboard").iterdir())
    assert len(event_files) == 1
    assert b"heldout_by_length/0-4k" in event_files[0].read_bytes()


def test_gauges_for_prometheus() -> None:
    from longalign_ray.train.ray_train import PrometheusSink

    sink = PrometheusSink("mine")
    sink.write(3, {"loss": 2.5, "heldout_by_length/0-4k": 2.25})
    gauges = {gauge.info["name"]: gauge.info["tag_keys"] for gauge in sink._gauges.values()}
    names = ("longalign_step", "longalign_loss", "longalign_heldout_by_length_0_4k")
    assert gauges == dict.fromkeys(names, ("run",))


def test_export_is_a_model_that_plain_transformers_loads(
    undisturbed: tuple[RunConfig, RunDir], tiny_model_dir: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, run_dir = undisturbed
    stages.export(config, run_dir)
    aligned = AutoModelForCausalLM.from_pretrained(run_dir.model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(run_dir.model)
    assert tokenizer.chat_template
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "question 0 word "}, {"role": "assistant", "content": "answer answer "}],
        tokenize=False,
    )
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        after, before = (model(input_ids=ids, labels=ids).loss.item() for model in (aligned, base))
    assert after < before - 0.3  # the weights are the trained ones


@pytest.fixture
def nodes(local_ray: None) -> Iterator[Cluster]:
    """Gives this test's own Ray more nodes, on this machine."""
    from ray._private import worker
    from ray.cluster_utils import Cluster

    cluster = Cluster(shutdown_at_exit=False)  # its hooks are for the main thread alone
    cluster.head_node = worker._global_node
    yield cluster
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)


@pytest.mark.slow
def test_a_node_is_lost_and_another_joins(
    undisturbed: tuple[RunConfig, RunDir],
    prepared: Prepared,
    nodes: Cluster,
    tmp_path: Path,
    s3: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ranks on two nodes; when one is gone, one rank on the other; two again when there is a third.

    With its checkpoints in an object store. A node has room for one rank.
    """
    import ray.train

    s3_bucket(s3, "runs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")  # Ray counts the lost node for 20 s
    soon = partial(ray.train.ScalingConfig, elastic_resize_monitor_interval_s=1)
    monkeypatch.setattr(ray.train, "ScalingConfig", soon)
    address = f"s3://runs/{tmp_path.name}/checkpoints"
    config, run_dir = prepared(
        tmp_path, num_workers=[1, 2], cpus_per_worker=3, max_failures=1, checkpoint_storage=address
    )
    store = CheckpointStore.at(address, endpoint=s3)
    lost = nodes.add_node(num_cpus=3)

    def last_step(*, world_size: int) -> int:
        return max((one.state.step for one in store.finished()[0] if one.state.world_size == world_size), default=0)

    def faults() -> tuple[int, int, list[dict[str, Any]]]:
        """Steps done with two ranks and with one when that was over, and the metrics of them."""
        wait_until(lambda: last_step(world_size=2), "no checkpoint of two ranks")
        of_two = last_step(world_size=2)
        nodes.remove_node(lost, allow_graceful=False)
        wait_until(lambda: last_step(world_size=1), "no checkpoint of the rank that was left")
        [rank] = training_ranks()
        rank.suspend()
        of_one = last_step(world_size=1)
        nodes.add_node(num_cpus=3)
        # Ray ends the rank for two others; it must not go on until then, as it has but a few steps left.
        wait_until(lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE, "no more ranks were started")
        return of_two, of_one, read_metrics(run_dir.metrics)[:of_one]

    with ThreadPoolExecutor() as threads:
        done = threads.submit(faults)
        stages.train(config, run_dir)
        of_two, of_one, rows = done.result()
    found, wanted = losses(run_dir), losses(undisturbed[1])
    assert found[:of_two] == wanted[:of_two]
    assert [step for step, *_ in found] == [step for step, *_ in wanted]
    assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in wanted], rel=1e-5)
    assert 0 < of_two < of_one < len(wanted)
    assert read_metrics(run_dir.metrics)[:of_one] == rows  # with their times: none was taken again
    assert store.finished()[0][0].state.world_size == 2
    assert StepPlan.load(run_dir.plan).world_size == 2
    assert not run_dir.checkpoints.exists()
    stages.export(config, run_dir)
    stages.export(*undisturbed)
    one, two = (load_file(directory.model / "model.safetensors") for directory in (run_dir, undisturbed[1]))
    for name in two:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_ranks_that_share_packs_take_the_same_steps(
    undisturbed: tuple[RunConfig, RunDir], prepared: Prepared, tmp_path: Path
) -> None:
    """The same losses as those of ranks with a pack each, held-out ones too, up to the order of fp32 sums."""
    config, run_dir = prepared(tmp_path)
    config = config.model_copy(update={"train": config.train.model_copy(update={"sp_degree": 2})})
    stages.train(config, run_dir)
    found, wanted = losses(run_dir), losses(undisturbed[1])
    assert [step for step, *_ in found] == [step for step, *_ in wanted]
    assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in wanted], rel=1e-5)
    shared, apart = (read_metrics(directory.metrics)[-1] for directory in (run_dir, undisturbed[1]))
    for name in ("heldout_loss", "heldout_token_loss", "heldout_by_length"):
        assert shared[name] == pytest.approx(apart[name], rel=1e-5), name
    assert StepPlan.load(run_dir.plan).sp_degree == 2


def test_a_killed_driver_continues_bitwise_from_before_a_damaged_checkpoint(
    undisturbed: tuple[RunConfig, RunDir], prepared: Prepared, tmp_path: Path
) -> None:
    """After the test with a range of ranks: for 180 s Ray counts the room of a killed driver as taken."""
    config, run_dir = prepared(tmp_path)
    store = CheckpointStore.at(run_dir.checkpoints)
    kill_the_driver(tmp_path / "recipe.yaml", when=lambda: len(store.finished()[0]) >= 2)
    (newest, before, *_), _ = store.finished()
    shard = run_dir.checkpoints / newest.name / max(name for name in newest.files if name.endswith(".pt"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    rows = read_metrics(run_dir.metrics)
    stages.train(config, run_dir)
    again = read_metrics(run_dir.metrics)
    assert again[: before.state.step] == rows[: before.state.step]
    assert again[before.state.step] != rows[before.state.step]  # its time: it was taken again
    assert losses(run_dir) == losses(undisturbed[1])
    stages.export(config, run_dir)
    stages.export(*undisturbed)
    weights = [(directory.model / "model.safetensors").read_bytes() for directory in (run_dir, undisturbed[1])]
    assert weights[0] == weights[1]


def kill_the_driver(recipe: Path, *, when: Callable[[], bool]) -> None:
    """Trains in a process of its own on this test's Ray, and SIGKILLs it."""
    import ray

    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "longalign_ray.cli", "train", str(recipe), f"ray.address={address}"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not when():
            assert driver.poll() is None, "the driver ended"
            time.sleep(0.02)
    finally:
        driver.kill()
        driver.wait()
    time.sleep(2)  # its ranks die with it


def test_a_refusal_of_a_rank_is_the_message_and_nothing_is_started_anew(prepared: Prepared, tmp_path: Path) -> None:
    config, run_dir = prepared(tmp_path, learning_rate=1e12, max_failures=1)
    with pytest.raises(LongAlignError, match=r"rank 0: .* of step \d+ is (nan|inf).*talk-\d+.*learning_rate"):
        stages.train(config, run_dir)
    assert len(list((run_dir.metrics.parent / "tensorboard").iterdir())) == 1  # a file for each start
