"""The Serve config that `serve deploy` takes, from the same recipe, and the application that it names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ray import serve

from longalign_ray.config import ServeConfig
from longalign_ray.data.template import absolute_template
from longalign_ray.serve.app import APP_NAME, QUIET, build_application


def application(args: dict[str, Any]) -> serve.Application:
    """The application that a written config stands for; keys are read here, on the cluster."""
    return build_application(
        {name: Path(path) for name, path in args["models"].items()},
        ServeConfig.model_validate(args["serve"]),
        chat_template=args["chat_template"],
        dtype=args["dtype"],
    )


def deploy_config(models: Mapping[str, Path], config: ServeConfig, *, chat_template: str | None, dtype: str) -> str:
    """YAML for `serve deploy`: paths are absolute, so every machine needs them, and keys stay where they are."""
    args = {
        "models": {name: str(Path(path).resolve()) for name, path in models.items()},
        "serve": config.model_dump(mode="json")
        | {"adapters": {name: str(Path(path).resolve()) for name, path in config.adapters.items()}},
        "chat_template": absolute_template(chat_template),
        "dtype": dtype,
    }
    described = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": config.host, "port": config.port},
        "logging_config": QUIET,
        "applications": [
            {"name": APP_NAME, "route_prefix": "/", "import_path": f"{__name__}:application", "args": args}
        ],
    }
    return yaml.safe_dump(described, sort_keys=False, allow_unicode=True)
