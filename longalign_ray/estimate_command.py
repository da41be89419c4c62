"""`longalign evaluate --estimate`: the tokens and GPU hours of an evaluation, before a server is started."""

from __future__ import annotations

import argparse
from pathlib import Path

from longalign_ray import stages
from longalign_ray.config_load import load_config
from longalign_ray.data.cost import sequence_cost
from longalign_ray.data.pipeline import model_shape
from longalign_ray.errors import ConfigError
from longalign_ray.evaluate.cost import ServingRates, cost_table, task_cost
from longalign_ray.model_source import local_model_dir
from longalign_ray.run_dir import RunDir
from longalign_ray.train.model_shape import ModelShape


def describe_estimate(arguments: argparse.Namespace) -> str:
    """The table that the command prints. Raises ConfigError for rates not above 0, and what making the cases raises."""
    for option, value in {"--tflops": arguments.tflops, "--bandwidth": arguments.bandwidth}.items():
        if not value > 0:
            raise ConfigError(f"{option} = {value:g}: give a rate above 0")
    config = load_config(arguments.recipe, arguments.overrides)
    model = model_shape(local_model_dir(config.model.path))
    cost, shape = sequence_cost(model), ModelShape.of(model)
    rates = ServingRates(arguments.tflops, arguments.bandwidth, config.evaluate.concurrency)
    cases = stages.evaluation_cases(config, RunDir(Path(config.run_dir)))
    costs = {task: task_cost(of_task, cost, shape, rates) for task, of_task in cases.items()}
    return cost_table(costs, num_models=len(config.evaluate.models), rates=rates)
