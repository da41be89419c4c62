"""Ray Data glue of `generate`: parts of a file of requests -> a pool of actors with an engine each -> files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longalign_ray.config import GenerateConfig, ServeConfig
from longalign_ray.data.template import absolute_template
from longalign_ray.errors import ServingError
from longalign_ray.logs import progress
from longalign_ray.serve.part_answerer import PartAnswerer
from longalign_ray.serve.request_parts import counts_of, open_parts, request_parts

MOST_BLOCKS = 4_096  # Ray Data keeps a few kB for each


def generate(
    config: GenerateConfig,
    serve: ServeConfig,
    *,
    connect: Callable[[], None],
    output: Path,
    model_dir: Path,
    weights: Any,
    chat_template: str | None,
    dtype: str,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Counts over all parts, and the number of failed requests by reason.

    connect: initialises Ray; called only where something is to be done, once requests and output were looked at.
    Parts that are done are kept: weights, limits or requests that differ are refused. Raises ServingError where the
    requests cannot be read, or an engine cannot be had or ends; whole parts are kept.
    """
    import ray

    template = absolute_template(chat_template)
    tied = [config.model, weights, serve.max_prompt_tokens, serve.max_output_tokens, dtype, template]
    parts = request_parts(Path(config.requests or ""), num_lines=config.requests_per_part, tied=tied)
    waiting = open_parts(parts, output)
    problems = []
    if waiting:
        connect()
        answerer: Any = PartAnswerer  # a class, of which Ray's types do not know
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = ray.data.from_items(
            [asdict(part) for part in waiting], override_num_blocks=min(len(waiting), MOST_BLOCKS)
        ).map(
            answerer,
            fn_constructor_args=(str(model_dir.resolve()), serve),
            fn_constructor_kwargs={
                "name": config.model, "dtype": dtype, "chat_template": template, "output": str(output.resolve())
            },
            compute=ray.data.ActorPoolStrategy(min_size=serve.min_replicas, max_size=serve.max_replicas),
            num_cpus=serve.cpus_per_replica,
            num_gpus=serve.gpus_per_replica,
        )  # fmt: skip
        with progress("generate: parts answered", len(waiting)) as bar:
            for done, row in enumerate(dataset.iter_rows(), 1):
                problems += [row["problem"]] if row["problem"] else []
                bar.advance(done)
    if problems:
        raise ServingError(f"{len(problems)} of {len(waiting)} parts were not answered: {problems[0]}")
    counts: Counter[str] = Counter({"parts": len(parts), "resumed_parts": len(parts) - len(waiting)})
    dropped: Counter[str] = Counter()
    for of_part in counts_of(parts, output):
        counts.update(of_part["counts"])
        dropped.update(of_part["dropped"])
    return dict(counts), dict(sorted(dropped.items()))
