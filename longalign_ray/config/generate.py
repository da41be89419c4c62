"""Answers to a file of requests, with no HTTP between."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from longalign_ray.config.section import Section


class GenerateConfig(Section):
    """What `longalign generate` answers; the engines are those of `serve`, `serve.num_replicas` of them."""

    requests: str | None = None
    """JSON lines, each with an `id` and what /v1/chat/completions (`messages`) or /v1/completions (`prompt`) takes."""
    output: str | None = None
    """Directory of the answers; none: `generate` of the run directory."""
    model: Literal["base", "aligned"] = "aligned"
    """Which model answers."""
    requests_per_part: PositiveInt = 512
    """Lines of a part: what is answered by one engine and written at once; a killed run continues after whole parts."""
