"""Ray Serve glue: one application, the HTTP layer in an ingress replica and each model in a deployment of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from longalign_ray.api_keys import digests, read_keys
from longalign_ray.config import ServeConfig
from longalign_ray.data.template import absolute_template
from longalign_ray.errors import ServingError
from longalign_ray.serve.remote_engine import RemoteEngine
from longalign_ray.serve.replica import EngineReplica

logger = logging.getLogger(__name__)

APP_NAME = "longalign"
INGRESS_NAME = "openai-api"
POLL_SECONDS = 0.5
LOAD_SECONDS = HEALTH_SECONDS = 10.0  # how often Serve hears of a replica's load, and asks how it is: its defaults
LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")
QUIET = {"log_level": "WARNING", "enable_access_log": False}


@serve.ingress()
class Ingress:
    """The HTTP layer: tokenizers and text here, tokens in the engines."""

    def __init__(
        self,
        engines: dict[str, DeploymentHandle],
        model_dirs: dict[str, str],
        config: ServeConfig,
        *,
        chat_template: str | None,
        key_digests: tuple[bytes, ...],
    ):
        from longalign_ray.serve.answer import served_model
        from longalign_ray.serve.api import build_api

        models = {
            name: served_model(
                name,
                RemoteEngine(name, handle, affinity_tokens=config.affinity_tokens),
                Path(model_dirs[name]),
                chat_template=chat_template,
            )
            for name, handle in engines.items()
        }
        base = next(iter(engines))
        for name in config.adapters:
            engine = RemoteEngine(name, engines[base], adapter=name, affinity_tokens=config.affinity_tokens)
            models[name] = dataclasses.replace(models[base], name=name, engine=engine, parent=base)
        deployments = {name: model.parent or name for name, model in models.items()}
        self._api = build_api(models, config, health=lambda: _ready(deployments), key_digests=key_digests)

    def __serve_build_asgi_app__(self) -> Any:
        return self._api


async def _ready(deployments: Mapping[str, str]) -> dict[str, bool]:
    """Whether each model's deployment has a running replica, as Serve's controller sees it."""
    seen = (await asyncio.to_thread(serve.status)).applications[APP_NAME].deployments
    return {
        name: deployment in seen and any(state == "RUNNING" for state in seen[deployment].replica_states)
        for name, deployment in deployments.items()
    }


def build_application(
    models: Mapping[str, Path], config: ServeConfig, *, chat_template: str | None, dtype: str
) -> serve.Application:
    """The Serve application; nothing is started. `config.adapters` are over the first of the models."""
    model_dirs = {name: str(Path(path).resolve()) for name, path in models.items()}
    adapters = {name: str(Path(path).resolve()) for name, path in config.adapters.items()}
    keys = () if config.api_keys is None else digests(read_keys(config.api_keys))
    actor_options: dict[str, Any] = {"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica}
    ending: dict[str, Any] = {
        "graceful_shutdown_timeout_s": config.drain_seconds,
        "graceful_shutdown_wait_loop_s": POLL_SECONDS,
        "health_check_period_s": min(HEALTH_SECONDS, config.stuck_seconds / 4),
        "max_constructor_retry_count": 1,  # a model that does not load will not load the second time either
    }
    engines = {
        name: serve.deployment(
            EngineReplica,
            name=name,
            ray_actor_options=actor_options,
            max_ongoing_requests=config.max_ongoing_requests,
            max_queued_requests=config.max_queued_requests,
            **_replicas(config),
            **_routing(config),
            **ending,
        ).bind(model_dir, config, dtype=dtype, adapters=adapters if number == 0 else {})
        for number, (name, model_dir) in enumerate(model_dirs.items())
    }
    accepted = config.max_replicas * config.max_ongoing_requests + config.max_queued_requests
    template = absolute_template(chat_template)
    return serve.deployment(
        Ingress,
        name=INGRESS_NAME,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * len(models) * accepted + 64,  # the models' queues refuse, not this one
        **ending,
    ).bind(engines, model_dirs, config, chat_template=template, key_digests=keys)


def _replicas(config: ServeConfig) -> dict[str, Any]:
    if isinstance(config.num_replicas, int):
        return {"num_replicas": config.num_replicas}
    seconds = min(LOAD_SECONDS, config.busy_seconds, config.idle_seconds)
    return {
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": config.busy_seconds,
            "downscale_delay_s": config.idle_seconds,
            "look_back_period_s": 1.5 * seconds,  # which has to be longer than the interval
            **({} if seconds == LOAD_SECONDS else {"metrics_interval_s": seconds}),
        }
    }


def _routing(config: ServeConfig) -> dict[str, Any]:
    """By default Serve takes the less busy of two replicas; here, the one that a hash of the prompt names."""
    if not config.affinity_tokens:
        return {}
    return {
        "request_router_config": {
            "request_router_class": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
            "request_router_kwargs": {"num_fallback_replicas": config.max_replicas - 1},
        }
    }


@contextmanager
def running_app(
    models: Mapping[str, Path], config: ServeConfig, *, chat_template: str | None, dtype: str
) -> Iterator[str]:
    """Base URL (`http://127.0.0.1:PORT/v1`) of an application that answers; it is shut down on leaving.

    Ray is initialised by the caller. Raises ServingError where the port is taken, keys are missing, a model does not
    load, or the replicas are not ready in `start_timeout_seconds`.
    """
    _check_port(config.host, config.port)
    if serve.status().proxies:
        raise ServingError(
            "Ray Serve already runs on this cluster, and its address cannot be changed: end that run first, "
            "or evaluate against it with evaluate.endpoint=URL"
        )
    application = build_application(models, config, chat_template=chat_template, dtype=dtype)
    if config.host not in LOCAL_HOSTS and config.api_keys is None:
        logger.warning("serve.host = %s is open to other machines and asks for no key: set serve.api_keys", config.host)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(
            proxy_location="HeadOnly", http_options={"host": config.host, "port": config.port}, logging_config=QUIET
        )
        target = serve.RunTarget(application, name=APP_NAME, route_prefix="/", logging_config=QUIET)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        host = "127.0.0.1" if config.host in ("0.0.0.0", "::", "") else config.host
        root = f"http://{host}:{config.port}"
        _wait_until_ready(root, timeout_seconds=config.start_timeout_seconds)
        try:
            yield f"{root}/v1"
        finally:
            _drain(config.drain_seconds)
    finally:
        with redirect_stdout(io.StringIO()):  # Ray reports the controller's intended end there as a failed task
            serve.shutdown()


def _drain(seconds: float) -> None:
    """Returns when the requests that are under way have ended, or time is up; new ones are refused meanwhile.

    `serve.shutdown` would end the proxy, and with it every connection, at once.
    """
    deadline = time.monotonic() + seconds + 2 * POLL_SECONDS
    serve.delete(APP_NAME, _blocking=False)
    while APP_NAME in serve.status().applications and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 2)


def serve_forever(models: Mapping[str, Path], config: ServeConfig, *, chat_template: str | None, dtype: str) -> None:
    """Serves until interrupted (Ctrl-C or SIGTERM). Raises what `running_app` raises."""
    stopped = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        with running_app(models, config, chat_template=chat_template, dtype=dtype) as base_url:
            names = [*models, *config.adapters]
            body = json.dumps({"model": names[-1], "messages": [{"role": "user", "content": "Hello!"}]})
            logger.info("serving %s at %s; Ctrl-C ends it. Try:", ", ".join(names), base_url)
            key = "" if config.api_keys is None else "-H 'Authorization: Bearer KEY' "
            logger.info("curl %s/chat/completions %s-H 'Content-Type: application/json' -d '%s'", base_url, key, body)
            logger.info("or ask about a document in a browser: %s/", base_url.removesuffix("/v1"))
            while not stopped.wait(POLL_SECONDS):
                pass
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, previous)
    logger.info("stopped serving")


def _cause(application: Any) -> str:
    """What Serve says of each deployment that is not up: of a traceback, the error at its end."""
    causes = []
    for name, deployment in application.deployments.items():
        if deployment.status == "HEALTHY":
            continue
        lines = deployment.message.strip().splitlines()
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
        text = errors[-1].removeprefix("longalign_ray.errors.") if errors else " ".join(lines)
        if text:
            causes.append(f"{name}: {text}")
    return "; ".join(causes) or application.message or f"its state is {application.status}"


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServingError(
                f"serve.host = {host}, serve.port = {port} cannot be bound ({error.strerror or error}): "
                f"end what listens there, or choose another port with serve.port=PORT"
            ) from error


def _wait_until_ready(root: str, *, timeout_seconds: float) -> None:
    """Returns when /health says 200; raises ServingError where a deployment has failed or time is up."""
    import httpx

    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        application = serve.status().applications.get(APP_NAME)
        if application is not None and application.status == "DEPLOY_FAILED":
            raise ServingError(f"the endpoint could not be started: {_cause(application)}")
        with suppress(httpx.HTTPError):
            if httpx.get(f"{root}/health", timeout=POLL_SECONDS * 10).status_code == 200:
                return
        time.sleep(POLL_SECONDS)
    application = serve.status().applications.get(APP_NAME)
    raise ServingError(
        f"the endpoint was not ready within serve.start_timeout_seconds = {timeout_seconds:g}: "
        f"{_cause(application) if application else 'Serve has not started'}; raise the limit, or give the replicas "
        "fewer CPUs with serve.cpus_per_replica and serve.num_replicas"
    )
