"""The Serve application over HTTP: clients, refusals, overload, leaving clients, and an evaluation against it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from longalign_ray.config import (
    EvaluateConfig,
    GenerateConfig,
    LmEvalConfig,
    LongBenchConfig,
    NeedleConfig,
    ServeConfig,
)
from longalign_ray.data.store import Example
from longalign_ray.data.template import encode_prompt, load_tokenizer
from longalign_ray.errors import EvaluationError, ServingError
from longalign_ray.evaluate.benchmarks import task_cases
from longalign_ray.evaluate.haystack import default_haystack
from longalign_ray.evaluate.longbench_score import score_directory
from longalign_ray.evaluate.needle import needle_cases
from longalign_ray.evaluate.report import write_report
from longalign_ray.evaluate.runner import evaluate
from longalign_ray.evaluate.short_tasks import load_short_tasks, score_short_tasks
from longalign_ray.evaluate.task import TaskInputs
from longalign_ray.run_dir import RunDir
from tests.tiny_model import write_tiny_model

pytestmark = pytest.mark.usefixtures("local_ray")

MESSAGES: Any = [{"role": "user", "content": "What is long context?"}]
KEY = "a-key-of-the-tests-01"
LOCUSTFILE = Path(__file__).parents[1] / "locustfile.py"
NEEDLES = NeedleConfig(lengths=(400, 900), depths=(0, 50), max_new_tokens=4)
ENDLESS: dict[str, Any] = {"temperature": 0, "max_tokens": 3_000}  # the tiny model repeats itself and never ends


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def models(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models that differ in their weights."""
    made = {}
    for seed, name in enumerate(("base", "aligned")):
        made[name] = write_tiny_model(tmp_path_factory.mktemp(name), seed=seed)
    return made


@pytest.fixture(scope="module")
def adapted(models: dict[str, Path]) -> Any:
    """The base model under a random adapter."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(models["base"], dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(base, config).eval()


@pytest.fixture(scope="module")
def base_url(
    models: dict[str, Path], adapted: Any, local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    from longalign_ray.serve.app import running_app

    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    adapted.save_pretrained(keys.parent / "adapter")
    config = ServeConfig(
        port=free_port(),
        adapters={"adapted": str(keys.parent / "adapter")},
        api_keys=f"file:{keys}",
        max_ongoing_requests=2,
        max_queued_requests=8,
        max_sequences=2,
        max_prompt_tokens=1_000,
        affinity_tokens=8,
    )
    with running_app(models, config, chat_template=None, dtype="float32") as url:
        yield url


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


def greedy_text(model_dir: Path, num_tokens: int, messages: Any = MESSAGES, *, model: Any = None) -> str:
    """Of the directory's model, or of `model` with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model = model or AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompt = torch.tensor([encode_prompt(tokenizer, messages)])
    settings = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
    return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).rstrip("\ufffd")


def engine_stats(name: str) -> Any:
    from ray import serve

    handle: Any = serve.get_deployment_handle(name, "longalign")
    return handle.stats.remote().result(timeout_s=60)


def wait_until_idle(name: str) -> Any:
    deadline = time.monotonic() + 30
    while (stats := engine_stats(name)).active + stats.waiting:
        assert time.monotonic() < deadline, stats
        time.sleep(0.1)
    return stats


def test_health_and_models(base_url, client):
    health = httpx.get(base_url.removesuffix("/v1") + "/health")
    assert (health.status_code, health.json()["models"]) == (200, {"base": True, "aligned": True, "adapted": True})
    parents = {model.id: model.parent for model in client.models.list()}
    assert parents == {"base": None, "aligned": None, "adapted": "base"}
    assert client.models.retrieve("base").id == "base"


@pytest.mark.parametrize("name", ["base", "aligned"])
def test_each_name_answers_with_its_own_model(client, models, name):
    expected = greedy_text(models[name], 16)
    settings: dict[str, Any] = {"model": name, "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**settings)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 16
    chunks = list(client.chat.completions.create(**settings, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert len(chunks) >= 4  # the role, the first token by itself, the others, the end


def test_asynchronous_client_streams_the_same(client, base_url):
    settings: dict[str, Any] = {"model": "base", "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**settings)

    async def streamed() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=base_url, api_key=KEY, max_retries=0) as asking:
            options: Any = {"stream": True, "stream_options": {"include_usage": True}}
            return [chunk async for chunk in await asking.chat.completions.create(**settings, **options)]

    *chunks, last = asyncio.run(streamed())
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert last.usage == whole.usage


def test_an_adapter_and_its_base_answer_side_by_side(client: openai.OpenAI, models: dict[str, Path], adapted: Any):
    """They are one deployment; its engine computes both in the same steps."""
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(client.chat.completions.create, model=name, messages=MESSAGES, max_tokens=16, temperature=0)  # pyright: ignore[reportArgumentType]
            for name in ("base", "adapted")
        ]
        base, answer = (each.result().choices[0].message.content for each in asked)
    assert base == greedy_text(models["base"], 16)
    assert answer == greedy_text(models["base"], 16, model=adapted) != base


def test_completion_scores_token_ids(client):
    ids = list(range(60, 100))
    choice = client.completions.create(model="base", prompt=ids, max_tokens=0, echo=True, logprobs=1).choices[0]
    log_probs = choice.logprobs.token_logprobs
    assert log_probs[0] is None
    assert len(log_probs) == 40
    assert all(-30 < log_prob < 0 for log_prob in log_probs[1:])


def test_concurrent_requests_all_get_their_own_answer(base_url):
    """Eight at a time, as many as the queue holds beside the two that are computed."""

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=base_url, api_key=KEY, max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(model="aligned", prompt=f"{number} ", max_tokens=2, echo=True)
                    for number in range(8)
                )
            )
        return [answer.choices[0].text for answer in answers]

    texts = asyncio.run(ask_all())
    assert [text.split(" ")[0] for text in texts] == [str(number) for number in range(8)]


def test_refusals_come_in_openai_shape(client, base_url):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    assert unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError, match=r"max_prompt_tokens is 1,?000"):
        client.completions.create(model="base", prompt="x" * 1_001)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="base", messages=MESSAGES, temperature=-1)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    broken = httpx.post(f"{base_url}/chat/completions", content='{"model": ', headers=headers)
    assert broken.status_code == 400
    assert "not valid JSON" in broken.json()["error"]["message"]
    with pytest.raises(openai.AuthenticationError, match="no valid API key"):
        client.with_options(api_key="another").models.list()


def test_leaving_clients_free_the_replica(client):
    before = wait_until_idle("base").cancelled
    stream = client.chat.completions.create(model="base", messages=MESSAGES, stream=True, **ENDLESS)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1.0).chat.completions.create(model="base", messages=MESSAGES, **ENDLESS)
    assert wait_until_idle("base").cancelled == before + 2


def test_overload_is_429_with_retry_after(base_url):
    """2 computed + 8 waiting: of 30 endless requests at once some are refused, in the client's own error type."""

    async def flood() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=base_url, api_key=KEY, max_retries=0) as client:
            asked = [
                asyncio.ensure_future(client.chat.completions.create(model="base", messages=MESSAGES, **ENDLESS))
                for _ in range(30)
            ]
            deadline = time.monotonic() + 30
            while sum(task.done() for task in asked) < 10 and time.monotonic() < deadline:
                await asyncio.sleep(0.1)
            for task in asked:
                task.cancel()
            return await asyncio.gather(*asked, return_exceptions=True)

    outcomes = asyncio.run(flood())
    refused = [outcome for outcome in outcomes if isinstance(outcome, openai.RateLimitError)]
    assert len(refused) >= 10  # up to 20: several may pass the check of the queue at once
    assert int(refused[0].response.headers["retry-after"]) > 0
    assert refused[0].type == "rate_limit_error"
    unexpected = [each for each in outcomes if not isinstance(each, openai.RateLimitError | asyncio.CancelledError)]
    assert all(hasattr(each, "choices") for each in unexpected), unexpected  # answered in time, or refused, never lost
    wait_until_idle("base")


def test_second_application_is_refused(base_url, models):
    from longalign_ray.serve.app import running_app

    taken = int(base_url.split(":")[2].split("/")[0])
    for port, words in ((taken, f"serve.port = {taken} cannot be bound"), (free_port(), "already runs")):
        with (
            pytest.raises(ServingError, match=words),
            running_app(models, ServeConfig(port=port), chat_template=None, dtype="float32"),
        ):
            pass
    assert httpx.get(base_url.removesuffix("/v1") + "/health").status_code == 200


def test_a_file_of_requests_is_answered_as_the_server_does(models, client, tmp_path):
    """By engines in Ray actors, without HTTP; what is done is not done again."""
    from longalign_ray.serve.generate import generate

    bodies = [{"messages": [{"role": "user", "content": f"Say {number}."}]} for number in range(5)]
    lines = [
        json.dumps({"id": number, "max_tokens": 12, "temperature": 0, **body}) for number, body in enumerate(bodies)
    ]
    (tmp_path / "requests.jsonl").write_text("\n".join([*lines, "no request"]))
    arguments: dict[str, Any] = {
        "config": GenerateConfig(requests=str(tmp_path / "requests.jsonl"), requests_per_part=2),
        "serve": ServeConfig(max_sequences=2),
        "connect": lambda: None,
        "output": tmp_path / "out",
        "model_dir": models["aligned"],
        "weights": "of the test",
        "chat_template": None,
        "dtype": "float32",
    }
    counts, dropped = generate(**arguments)
    assert (counts["requests"], counts["answered"], counts["parts"], dropped) == (6, 5, 3, {"bad_json": 1})
    paths = sorted((tmp_path / "out").glob("part-*.jsonl"))
    rows = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == [*range(5), None]
    for body, row in zip(bodies, rows, strict=False):
        made = client.chat.completions.create(model="aligned", max_tokens=12, temperature=0, **body)
        assert row["choices"][0]["message"]["content"] == made.choices[0].message.content
    paths[1].touch()
    times = [path.stat().st_mtime_ns for path in paths]
    next((tmp_path / "out" / "done").glob("00001-*.json")).unlink()  # as if killed before it was whole
    again, _ = generate(**arguments)
    assert {**again, "cached_tokens": 0} == {**counts, "cached_tokens": 0, "resumed_parts": 2}
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, times, strict=True)] == [True, False, True]
    arguments["weights"] = "trained anew"
    with pytest.raises(ServingError, match=r"generate\.output: .* of another model"):
        generate(**arguments)


def heldout_examples() -> list[Example]:
    random = np.random.default_rng(0)
    masks = [np.arange(60) >= 50, np.arange(25) % 3 == 0, np.arange(300) >= 10]
    return [
        Example(f"e{len(mask)}", random.integers(0, 256, len(mask), np.int32), 100 * mask.astype(np.uint8))
        for mask in masks
    ]


def loss_by_transformers(model_dir: Path, examples: list[Example]) -> tuple[float, float]:
    """Mean over sequences of their mean loss (Eq. 2), and mean over all targets."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    losses = []
    for example in examples:
        ids = torch.tensor(example.input_ids, dtype=torch.int64)
        with torch.inference_mode():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        of_token = -logprobs[:-1].gather(1, ids[1:, None])[:, 0]
        losses.append(of_token[torch.from_numpy(example.loss_weight[1:] > 0)])
    return float(torch.stack([loss.mean() for loss in losses]).mean()), float(torch.cat(losses).mean())


def longbench_files(directory: Path) -> LongBenchConfig:
    """A row of a set with a chat template and one of a set without, both longer than the models' context."""
    directory.mkdir()
    row = {"input": "why?", "context": "x = 1\n" * 1_000, "answers": ["x"], "length": 5_000, "all_classes": None}
    for name in ("hotpotqa", "lcc"):
        (directory / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    prompts = dict.fromkeys(("hotpotqa", "lcc"), "{context} {input}")
    (directory / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    return LongBenchConfig(
        data=str(directory),
        prompts=str(directory / "prompts.json"),
        sets=("hotpotqa", "lcc"),
        max_prompt_tokens=900,  # the chat template comes on top, and the server takes 1,000
    )


def test_evaluate_against_the_served_models(models: dict[str, Path], base_url: str, tmp_path: Path):
    examples = heldout_examples()
    longbench = longbench_files(tmp_path / "longbench")
    config = EvaluateConfig(
        models=("base", "aligned"), concurrency=4, needle=NEEDLES, longbench=longbench, max_attempts=2
    )
    tokenizer = load_tokenizer(models["base"])
    run_dir = RunDir(tmp_path)
    haystack = default_haystack(0, min_chars=20_000)
    inputs = TaskInputs(examples, haystack, tokenizer, seed=0)
    arguments: dict[str, Any] = {"base_url": base_url, "cases": task_cases(config, inputs), "api_key": KEY}
    counts, failed = evaluate(config, run_dir, **arguments)
    assert failed == {}
    assert (counts["cases"], counts["answered"]) == (18, 18)
    for name, model_dir in models.items():
        sequence_mean, token_mean = loss_by_transformers(model_dir, examples)
        assert counts[f"{name}_heldout_loss"] == pytest.approx(sequence_mean, abs=1e-4)
        assert counts[f"{name}_heldout_token_loss"] == pytest.approx(token_mean, abs=1e-4)
        assert counts[f"{name}_needle_accuracy"] == 0.0  # random weights find nothing
        grid = json.loads((run_dir.scores / f"needle-{name}.json").read_text(encoding="utf-8"))["grid"]
        assert grid == [[0.0, 0.0], [0.0, 0.0]]
        published = score_directory(run_dir.predictions / f"longbench-{name}")
        assert published.rows["lcc"] == {"scored": 1, "unscored": 0, "published": 500}
        assert counts[f"{name}_longbench"] == pytest.approx(sum(published.scores.values()) / 200)
    assert counts["base_heldout_loss"] != pytest.approx(counts["aligned_heldout_loss"], abs=1e-3)

    again, _ = evaluate(config, run_dir, **arguments)
    assert again == counts | {"resumed": 18}

    summary = write_report(run_dir)
    assert summary["heldout"]["base"]["value"] == counts["base_heldout_loss"]
    assert f"{counts['aligned_heldout_loss']:.3f}" in run_dir.report_html.read_text(encoding="utf-8")


def short_task_files(directory: Path) -> list[dict[str, Any]]:
    """Files of the harness's tasks `colours`, of multiple choice, and `continue`, which generates; gives their rows."""
    directory.mkdir()
    rows = [
        {
            "question": f"Case {number}: is it",
            "choices": ["red", "dark green", "a very light blue"],
            "answer": number % 3,
        }
        for number in range(6)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "rows.jsonl").write_text(lines, encoding="utf-8")
    data = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory / "rows.jsonl"}}}, cache_dir: {directory / "cache"}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
    (directory / "colours.yaml").write_text(
        f"task: colours\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n{data}"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (directory / "continue.yaml").write_text(
        f"task: continue\noutput_type: generate_until\ndoc_to_target: '{{{{choices[0]}}}}'\n{data}"
        "generation_kwargs: {max_gen_toks: 8, until: ['</s>']}\nmetric_list: [{metric: exact_match}]\n"
    )
    return rows


def choices_by_transformers(model_dir: Path, rows: list[dict[str, Any]]) -> list[int]:
    """The likeliest choice of each row, by log-probability a byte."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(model_dir)
    chosen = []
    for row in rows:
        likelihoods = []
        for choice in row["choices"]:
            start = len(tokenizer(row["question"])["input_ids"])
            ids = torch.tensor(tokenizer(f"{row['question']} {choice}")["input_ids"])
            with torch.inference_mode():
                logprobs = model(ids[None]).logits[0].log_softmax(-1)
            of_token = logprobs[start - 1 : -1].gather(1, ids[start:, None])
            likelihoods.append(float(of_token.sum()) / len(choice))
        chosen.append(likelihoods.index(max(likelihoods)))
    return chosen


def test_short_tasks_of_the_harness(
    models: dict[str, Path], base_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'longalign_ray[short]'")
    rows = short_task_files(tmp_path / "tasks")
    short = LmEvalConfig(tasks={"colours": 0, "continue": None}, include_path=str(tmp_path / "tasks"))
    config = EvaluateConfig(concurrency=4, lm_eval=short, max_attempts=2)
    tasks, run_dir = load_short_tasks(short), RunDir(tmp_path)
    arguments: dict[str, Any] = {"tasks": tasks, "base_url": base_url, "tokenizer_dir": models["base"], "api_key": KEY}
    counts = score_short_tasks(config, run_dir, **arguments)
    for name, model_dir in models.items():
        chosen = choices_by_transformers(model_dir, rows)
        right = [float(choice == row["answer"]) for choice, row in zip(chosen, rows, strict=True)]
        score = json.loads((run_dir.scores / f"lm_eval-{name}.json").read_text(encoding="utf-8"))
        assert list(score["by_case"]["colours"].values()) == right
        assert counts[f"{name}_colours"] == sum(right) / 6
        assert score["parts"]["colours"]["stderr"] == pytest.approx(np.std(right, ddof=1) / 6**0.5)
        assert counts[f"{name}_short_accuracy"] == sum(right) / 12  # nobody continues with the colour

    finished = [engine_stats(name).finished for name in models]
    assert score_short_tasks(config, run_dir, **arguments) == counts
    assert [engine_stats(name).finished for name in models] == finished  # not asked again

    arguments["api_key"] = "another-key"
    with pytest.raises(EvaluationError, match="colours of base: a request failed"):
        score_short_tasks(config, RunDir(tmp_path / "other"), **arguments)
    assert "Bearer [key]" in caplog.text
    assert "another-key" not in caplog.text


def test_the_harness_asks_chats_as_well(models: dict[str, Path], base_url: str, tmp_path: Path):
    harness: Any = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'longalign_ray[short]'")
    registry: Any = pytest.importorskip("lm_eval.api.registry")
    rows = short_task_files(tmp_path / "tasks")
    (task,) = load_short_tasks(LmEvalConfig(tasks={"continue": None}, include_path=str(tmp_path / "tasks")))
    chat = registry.get_model("local-chat-completions")(
        model="base",
        base_url=f"{base_url}/chat/completions",
        num_concurrent=4,
        header={"Authorization": f"Bearer {KEY}"},
    )
    results = harness.simple_evaluate(
        model=chat, tasks=[task.loaded], task_manager=task.manager, apply_chat_template=True
    )
    answers = [sample["resps"][0][0] for sample in results["samples"]["continue"]]
    expected = [greedy_text(models["base"], 8, [{"role": "user", "content": row["question"]}]) for row in rows]
    assert answers == expected


def test_the_server_counts_the_prompt_as_the_grid_does(models: dict[str, Path], base_url: str):
    tokenizer = load_tokenizer(models["base"])
    haystack = default_haystack(0, min_chars=20_000)
    for case in needle_cases(NEEDLES, haystack=haystack, tokenizer=tokenizer, seed=0):
        body = {"model": "base", **case.request}
        headers = {"Authorization": f"Bearer {KEY}"}
        answer = httpx.post(base_url + case.path, json=body, headers=headers, timeout=60, trust_env=False).json()
        assert answer["usage"]["prompt_tokens"] == case.num_tokens <= case.attributes["length"]


@pytest.mark.skipif(find_spec("locust") is None, reason="needs Locust: pip install locust")
def test_two_hundred_requests_are_answered_or_refused(base_url: str):
    """32 at a time against 2 computed + 8 waiting; none is lost, and those refused may be sent again."""
    root = base_url.removesuffix("/v1")
    options = ["--headless", "--json", "--users=32", "--spawn-rate=32", f"--host={root}", "--model=aligned"]
    run = subprocess.run(
        [sys.executable, "-m", "locust", f"--locustfile={LOCUSTFILE}", *options, "--requests=200"],
        env=os.environ | {"OPENAI_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    outcomes = {row["name"]: row["num_requests"] for row in json.loads(run.stdout)}
    assert set(outcomes) <= {"answered", "refused"}
    assert sum(outcomes.values()) == 200
    assert outcomes["answered"] >= 20
    text = httpx.get(f"{root}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    counted = {line.split(" ")[0]: float(line.split(" ")[1]) for line in text.splitlines() if line[0] != "#"}
    assert counted['longalign_requests_total{path="/v1/completions",status="429"}'] >= outcomes.get("refused", 0)
    assert counted['longalign_engine_requests{model="aligned",state="active"}'] == 0.0
