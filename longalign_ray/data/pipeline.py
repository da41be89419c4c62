"""Ray Data glue of `prepare`: corpus slices -> token store -> step plan -> packed blocks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from longalign_ray.config import DataConfig, RunConfig
from longalign_ray.data.conversation import RecordError, parse_record
from longalign_ray.data.corpus import CorpusSlice, corpus_files, cut_into_slices, read_lines
from longalign_ray.data.cost import sequence_cost
from longalign_ray.data.packed import num_packed_files, write_layout, write_packed_file
from longalign_ray.data.plan import StepPlan, make_plan
from longalign_ray.data.store import ExampleIndex, TokenStore, part_name, write_examples
from longalign_ray.data.template import Tokenizer, load_tokenizer
from longalign_ray.data.tokenize import tokenize_conversation
from longalign_ray.errors import CorpusError, ModelError
from longalign_ray.logs import progress
from longalign_ray.run_dir import RunDir

NOT_BROKEN = ("too_long", "no_target_left")  # reasons that speak of a record's length, not of its quality


@dataclass(frozen=True, slots=True)
class Prepared:
    """Counts for the manifest."""

    counts: dict[str, int | float]
    dropped_by_reason: dict[str, int]


def prepare(config: RunConfig, run_dir: RunDir, *, model_dir: Path, corpus: Sequence[str]) -> Prepared:
    """Writes store, index, rejects, plan and packed blocks of a run. Ray must be initialised.

    Raises CorpusError where a file is missing, nothing usable is in the corpus, or more than corpus.max_bad_fraction of
    it is broken; ModelError where the model has no tokenizer or chat template.
    """
    load_tokenizer(model_dir, chat_template=config.model.chat_template)  # fails here rather than in every task
    for directory in (run_dir.store, run_dir.packed):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    parts, counts, dropped = _write_store(config, run_dir, model_dir, corpus)
    index = _index(parts, config.data, config.seed)
    index.save(run_dir.store / "index.parquet")
    plan = plan_for(config, index, model_dir, world_size=config.train.num_workers)
    plan.save(run_dir.plan)
    num_packs = _write_packed(run_dir, plan, steps_per_file=config.packing.steps_per_file)
    planned = set(plan.example_rows.tolist())
    counts |= {
        "heldout": int(index.heldout.sum()),
        "planned": len(planned),
        "tokens": int(index.length.sum()),
        "targets": int(index.num_targets.sum()),
        "packs": num_packs,
        "steps": plan.num_steps,
        "fill": plan.fill(),
        "imbalance": plan.imbalance(),
    }
    if left := len(index) - int(index.heldout.sum()) - len(planned):
        dropped["beyond_max_steps"] = left
    return Prepared(counts, dropped)


def plan_for(config: RunConfig, index: ExampleIndex, model_dir: Path, *, world_size: int) -> StepPlan:
    """The recipe's plan for a number of ranks."""
    return make_plan(
        index,
        planner=config.packing.planner,
        capacity=config.packing.capacity,
        packs_per_step=config.packing.packs_per_step,
        world_size=world_size,
        cost=sequence_cost(model_shape(model_dir)),
        seed=config.seed,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
    )


def model_shape(model_dir: Path) -> dict[str, Any]:
    """config.json of a model. Raises ModelError where it is missing or describes no decoder."""
    try:
        shape = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        sequence_cost(shape)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{model_dir / 'config.json'} does not describe a decoder ({error})") from error
    return shape


def _write_store(
    config: RunConfig, run_dir: RunDir, model_dir: Path, corpus: Sequence[str]
) -> tuple[list[pa.Table], dict[str, int | float], dict[str, int]]:
    """Tokenises the corpus, a task a slice; returns index rows in order of the files, counts, and what was dropped."""
    slices = [part for path in corpus_files(corpus) for part in cut_into_slices(path)]
    if not slices:
        raise CorpusError(f"the corpus is empty: {', '.join(corpus)}; give files with one conversation a line")
    settings = {
        "data": config.data.model_dump(),
        "model_dir": str(model_dir.resolve()),
        "chat_template": config.model.chat_template,
        "store": str(run_dir.store.resolve()),
    }
    items = [{"number": number, **dataclasses.asdict(part)} for number, part in enumerate(slices)]
    parts: list[pa.Table] = []
    counts: Counter[str] = Counter()
    rejects: list[dict[str, Any]] = []
    with progress("prepare: slices tokenised", len(slices)) as bar:
        for row in _each(items, _tokenise_slice, settings):
            parts.append(pa.table({name: row[name] for name in ("example_id", "length", "num_targets", "file", "row")}))
            rejects += json.loads(row["rejects"])
            counts.update(json.loads(row["counts"]))
            bar.advance(len(parts))
    parts.sort(key=lambda table: table["file"][0].as_py() if len(table) else -1)
    rejects.sort(key=lambda reject: (corpus_order(reject["file"], slices), reject["line"]))
    run_dir.rejects.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejects), encoding="utf-8")
    dropped = dict(sorted(Counter(reject["reason"] for reject in rejects).items()))
    _check_rejects(config, run_dir, rejects, counts)
    return parts, dict(counts), dropped


def corpus_order(path: str, slices: Sequence[CorpusSlice]) -> int:
    """Position of a file among those of the corpus."""
    return next(number for number, part in enumerate(slices) if part.path == path)


def _each(items: list[dict[str, Any]], function: Any, settings: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Runs `function(item, settings)` on every item as one Ray Data task each; results as they finish."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(function, fn_args=[settings])
    return dataset.iter_rows()


def _tokenise_slice(item: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Writes one store file; returns its index columns, its rejects and its counts."""
    data = DataConfig(**settings["data"])
    tokenizer = _cached_tokenizer(settings["model_dir"], settings["chat_template"])
    number = item.pop("number")
    part = CorpusSlice(**item)
    examples, rejects, counts = [], [], Counter(records=0, examples=0, cut_examples=0, cut_tokens=0)
    for line_number, line in read_lines(part):
        counts["records"] += 1
        try:
            conversation = parse_record(line, source=part.path, line_number=line_number)
            example, num_cut = tokenize_conversation(
                conversation, tokenizer, max_length=data.max_length, too_long=data.too_long
            )
        except RecordError as error:
            rejects.append({"file": part.path, "line": line_number, "reason": error.reason, "detail": str(error)})
            continue
        counts.update(examples=1, cut_examples=int(num_cut > 0), cut_tokens=num_cut)
        examples.append(example)
    write_examples(Path(settings["store"]) / part_name(number), examples)
    return {
        "example_id": [example.example_id for example in examples],
        "length": [example.length for example in examples],
        "num_targets": [example.num_targets for example in examples],
        "file": [number] * len(examples),
        "row": list(range(len(examples))),
        "rejects": json.dumps(rejects),
        "counts": json.dumps(counts),
    }


@lru_cache(maxsize=1)
def _cached_tokenizer(model_dir: str, chat_template: str | None) -> Tokenizer:
    return load_tokenizer(model_dir, chat_template=chat_template)


def _check_rejects(config: RunConfig, run_dir: RunDir, rejects: list[dict[str, Any]], counts: Counter[str]) -> None:
    bad = [reject for reject in rejects if reject["reason"] not in NOT_BROKEN]
    first = "; ".join(f"{r['file']}, line {r['line']}: {r['detail']}" for r in (bad or rejects)[:3])
    if len(bad) > config.corpus.max_bad_fraction * counts["records"]:
        raise CorpusError(
            f"{len(bad)} of {counts['records']} records are broken, and corpus.max_bad_fraction = "
            f"{config.corpus.max_bad_fraction}: mend them (all are in {run_dir.rejects}) or raise it. First: {first}"
        )
    if counts["examples"] == 0:
        raise CorpusError(f"the corpus has no usable conversation{'; first reject: ' + first if first else ''}")


def _index(parts: Sequence[pa.Table], data: DataConfig, seed: int) -> ExampleIndex:
    table = pa.concat_tables([part for part in parts if len(part)])
    example_id = table["example_id"].to_numpy()
    return ExampleIndex(
        example_id=example_id,
        length=table["length"].to_numpy().astype(np.int32),
        num_targets=table["num_targets"].to_numpy().astype(np.int32),
        file=table["file"].to_numpy().astype(np.int32),
        row=table["row"].to_numpy().astype(np.int32),
        heldout=choose_heldout(example_id, fraction=data.heldout_fraction, at_most=data.max_heldout, seed=seed),
    )


def choose_heldout(example_id: np.ndarray, *, fraction: float, at_most: int, seed: int) -> np.ndarray:
    """bool[n]: the examples whose hash of (seed, id) is lowest, so that adding data moves few of them."""
    digests = [hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8] for name in example_id]
    order = np.argsort(np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64), kind="stable")
    chosen = np.zeros(len(example_id), dtype=np.bool_)
    chosen[order[: min(round(fraction * len(example_id)), at_most)]] = True
    return chosen


def _write_packed(run_dir: RunDir, plan: StepPlan, *, steps_per_file: int) -> int:
    """Sorts the store into plan order, a task a file of packs; returns the number of packs."""
    settings = {
        "store": str(run_dir.store.resolve()),
        "plan": str(run_dir.plan.resolve()),
        "packed": str(run_dir.packed.resolve()),
        "steps_per_file": steps_per_file,
    }
    num_files = num_packed_files(plan, steps_per_file)
    num_packs = 0
    with progress("prepare: packed files written", num_files) as bar:
        items = [{"number": number} for number in range(num_files)]
        for done, row in enumerate(_each(items, _write_packed_slice, settings), 1):
            num_packs += row["num_packs"]
            bar.advance(done)
    write_layout(run_dir.packed, plan, steps_per_file=steps_per_file)
    return num_packs


def _write_packed_slice(item: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    num_packs = write_packed_file(
        TokenStore(Path(settings["store"])),
        StepPlan.load(Path(settings["plan"])),
        item["number"],
        steps_per_file=settings["steps_per_file"],
        directory=Path(settings["packed"]),
    )
    return {"num_packs": num_packs}
