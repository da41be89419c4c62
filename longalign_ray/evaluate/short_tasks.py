"""Short tasks (ARC, HellaSwag, TruthfulQA, MMLU) by EleutherAI's lm-evaluation-harness, asked of the same endpoint.

Prompts, data and scoring are the harness's own; here are which tasks, which model behind which address, and the score
file. Its answers are kept in a database a task and model, so that a killed or repeated run asks only what is missing.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from glob import escape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from longalign_ray.config import EvaluateConfig, LmEvalConfig
from longalign_ray.data.template import Tokenizer, load_tokenizer
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.predictions import file_stem
from longalign_ray.evaluate.task import TaskScore
from longalign_ray.run_dir import RunDir, digest, write_json

logger = logging.getLogger(__name__)

TASK = "lm_eval"
# The first that a task has is its score, 0 to 1, as on the Open LLM Leaderboard.
METRICS = ("acc_norm", "acc", "exact_match", "f1")
NO_LIMIT = 2**31  # tokens of a prompt: one that is too long shall be refused by the server, not cut by the harness


@dataclass(frozen=True, slots=True)
class ShortTask:
    """A task or a group of the harness, loaded with its data."""

    name: str
    num_fewshot: int | None
    loaded: Any
    manager: Any


@dataclass(frozen=True, slots=True)
class PartScore:
    """The score of one task, 0 to 1; `by_case` by document of the task or of the group's tasks."""

    metric: str
    value: float
    stderr: float | None
    num_cases: int
    by_case: dict[str, float]


def load_short_tasks(config: LmEvalConfig) -> list[ShortTask]:
    """The tasks of the recipe, with their data. No endpoint is needed.

    Raises EvaluationError where the harness is not installed, has no such task, or cannot get a task's data.
    """
    if find_spec("lm_eval") is None:
        raise EvaluationError(
            "evaluate.lm_eval needs the lm-evaluation-harness: pip install 'longalign_ray[short]', or leave it out"
        )
    from datasets.exceptions import DatasetsError

    TaskManager = import_module("lm_eval.tasks").TaskManager  # by name: it need not be there
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    own = None if config.include_path is None else TaskManager(include_path=config.include_path, include_defaults=False)
    all_tasks = functools.cache(lambda: TaskManager(include_path=config.include_path))  # reads 15,000 files
    tasks = []
    for name, num_fewshot in config.tasks.items():
        manager = own if own is not None and name in own.all_tasks else all_tasks()
        if name not in manager.all_tasks:
            raise EvaluationError(
                f"evaluate.lm_eval.tasks: the lm-evaluation-harness has no task {name}: `lm_eval ls tasks` lists them; "
                "one of your own is a YAML file below evaluate.lm_eval.include_path"
            )
        try:
            found = manager.load([name])
        except (OSError, ValueError, KeyError, DatasetsError) as error:
            raise EvaluationError(
                f"evaluate.lm_eval.tasks: {name} cannot be loaded ({type(error).__name__}: {error}): its data comes "
                "from the Hugging Face hub, once; without a network put it into the hub's cache first"
            ) from error
        loaded = found["groups"].get(name) or found["tasks"].get(name)
        scored = getattr(loaded, "has_aggregation", True) if loaded is not None else False
        if not scored or not all(set(METRICS) & set(task.aggregation()) for task in found["tasks"].values()):
            raise EvaluationError(
                f"evaluate.lm_eval.tasks: {name} has no score of its own by one of {', '.join(METRICS)}: name tasks "
                f"that have, such as {', '.join(list(found['tasks'])[:3])}"
            )
        tasks.append(ShortTask(name, num_fewshot, loaded, manager))
    return tasks


def score_short_tasks(
    config: EvaluateConfig,
    run_dir: RunDir,
    *,
    base_url: str,
    tasks: list[ShortTask],
    tokenizer_dir: Path,
    api_key: str | None = None,
) -> dict[str, float]:
    """Writes a score file a model; returns `<model>_short_accuracy`, the mean over the tasks, and `<model>_<task>`.

    Raises EvaluationError where a request fails in the end; what was answered is kept.
    """
    assert config.lm_eval is not None
    settings = {
        "base_url": f"{base_url.rstrip('/')}/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(tokenizer_dir),
        "add_bos_token": _begins_with_bos(load_tokenizer(tokenizer_dir)),
        "max_length": NO_LIMIT,
        "num_concurrent": config.concurrency,
        "max_retries": config.max_attempts,
        "timeout": math.ceil(config.request_timeout_seconds),
        # without one of its own the harness would send the key of OPENAI_API_KEY, to whatever endpoint
        "header": {"Accept": "application/json"} | ({} if api_key is None else {"Authorization": f"Bearer {api_key}"}),
    }
    if api_key is not None:
        _keep_out_of_logs(api_key)
    counts = {}
    for model in config.models:
        parts = {}
        for task in tasks:
            parts[task.name] = _ask(task, config, run_dir, model, settings)
            logger.info("%s: %s %s %.4f", model, task.name, parts[task.name].metric, parts[task.name].value)
        score = summed_up(parts)
        write_json(
            run_dir.scores / f"{file_stem(TASK, model)}.json",
            {
                "model": model,
                **asdict(score),
                "failed_by_reason": {},
                "parts": {
                    name: {"metric": part.metric, "stderr": part.stderr, "num_cases": part.num_cases}
                    for name, part in parts.items()
                },
            },
        )
        counts |= {f"{model}_{score.metric}": score.value}
        counts |= {f"{model}_{name}": part.value for name, part in parts.items()}
    return counts


def summed_up(parts: Mapping[str, PartScore]) -> TaskScore:
    """The mean of the tasks. The scores of cases are left out where a task's score is not their mean, as with a group
    that weights its tasks."""
    values = {name: part.value for name, part in parts.items()}
    by_case = {name: part.by_case for name, part in parts.items()}
    means = all(math.isclose(part.value, _mean(part.by_case), abs_tol=1e-9) for part in parts.values())
    num_cases = sum(part.num_cases for part in parts.values())
    return TaskScore(TASK, "short_accuracy", _mean(values), num_cases, values, by_case if means else {})


def part_score(name: str, results: Mapping[str, Any]) -> PartScore:
    """The score of a task or group in what the harness gives."""
    numbers = results["results"].get(name) or results["groups"][name]
    key = next(key for metric in METRICS for key in numbers if key.startswith(f"{metric},"))
    metric, _, filter_name = key.partition(",")
    stderr = numbers.get(f"{metric}_stderr,{filter_name}")
    by_case = {
        str(sample["doc_id"]) if len(results["samples"]) == 1 else f"{task}:{sample['doc_id']}": float(sample[metric])
        for task, samples in results["samples"].items()
        for sample in samples
        if sample["filter"] == filter_name and metric in sample
    }
    return PartScore(metric, numbers[key], stderr if isinstance(stderr, float) else None, len(by_case), by_case)


def _ask(task: ShortTask, config: EvaluateConfig, run_dir: RunDir, model: str, settings: dict[str, Any]) -> PartScore:
    import aiohttp
    import requests

    assert config.lm_eval is not None
    get_model = import_module("lm_eval.api.registry").get_model
    try:
        results = import_module("lm_eval").simple_evaluate(
            model=get_model("local-completions")(model=model, **settings),
            tasks=[task.loaded],
            num_fewshot=task.num_fewshot,
            limit=config.lm_eval.limit,
            use_cache=str(_answers(config, run_dir, model, task.name)),
            task_manager=task.manager,
        )
    except (aiohttp.ClientError, requests.RequestException, TimeoutError) as error:
        raise EvaluationError(
            f"{task.name} of {model}: a request failed ({type(error).__name__}: {error}); see the warnings above, put "
            f"the endpoint right and run `longalign evaluate` again: answers are kept"
        ) from error
    return part_score(task.name, results)


def _answers(config: EvaluateConfig, run_dir: RunDir, model: str, task: str) -> Path:
    """Beginning of the name of the file with a model's answers to a task: tied to the endpoint and the weights, it is
    another for a model that was trained anew, and then the old one is removed."""
    export = run_dir.manifest("export")
    weights = export.read_text(encoding="utf-8") if export.exists() else ""
    run_dir.predictions.mkdir(parents=True, exist_ok=True)
    stem, tied = f"{file_stem(TASK, model)}.{quote(task, safe='')}", digest(config.endpoint, weights, model)
    for other in run_dir.predictions.glob(f"{escape(stem)}.*.db"):
        if not other.name.startswith(f"{stem}.{tied}"):
            other.unlink()
    return run_dir.predictions / f"{stem}.{tied}"


def _keep_out_of_logs(api_key: str) -> None:
    """The harness and asyncio log failed requests with their headers, some when the run is over."""

    def masked(record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(api_key, "[key]"), None
        return True

    for name in ("lm_eval.models.api_models", "asyncio"):
        logging.getLogger(name).addFilter(masked)


def _begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether plain text is preceded by BOS, as the server has it for text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
