"""Ray Data glue of `prepare`: corpus slices -> token store -> step plan -> packed blocks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longalign_ray.config import DataConfig, RunConfig, SourceConfig
from longalign_ray.data.corpus_files import listed, source_files
from longalign_ray.data.cost import sequence_cost
from longalign_ray.data.decontaminate import EvaluationRuns, evaluation_texts
from longalign_ray.data.dedup import check_dedup, without_duplicates
from longalign_ray.data.example_ids import unique_ids
from longalign_ray.data.make_plan import PlanSettings, make_plan
from longalign_ray.data.mixture import training_rows, use_of_sources
from longalign_ray.data.packed import (
    keep_if_same,
    num_packed_files,
    remove_blocks,
    steps_for_block,
    write_layout,
    write_packed_slice,
)
from longalign_ray.data.plan import StepPlan
from longalign_ray.data.record_styles import printable
from longalign_ray.data.slice_store import EVALUATION_FILE, index_file, summary_file, tokenise_slice, tokens_file
from longalign_ray.data.store import ExampleIndex
from longalign_ray.data.store_parts import remove_others, store_parts
from longalign_ray.data.template import load_tokenizer, tokenising_state
from longalign_ray.errors import CorpusError, LongAlignError, ModelError
from longalign_ray.logs import progress
from longalign_ray.run_dir import RunDir, digest, whole_file

INDEX_COLUMNS = ["example_id", "length", "num_targets", "sum_weights", "file", "row"]
# Reasons of records that are well formed, but not of use here.
NOT_BROKEN = ("too_long", "no_target_left", "no_target", "duplicate", "near_duplicate", "contaminated")


@dataclass(frozen=True, slots=True)
class Prepared:
    """Counts for the manifest."""

    counts: dict[str, int | float]
    dropped_by_reason: dict[str, int]


def prepare(config: RunConfig, run_dir: RunDir, *, model_dir: Path, corpus: Mapping[str, SourceConfig]) -> Prepared:
    """Writes store, index, rejects, plan and packed blocks of a run. Ray must be initialised.

    Raises CorpusError where a file is missing, nothing usable is in the corpus, or more than corpus.max_bad_fraction of
    it is broken; ModelError where the model has no tokenizer or chat template.
    """
    load_tokenizer(model_dir, chat_template=config.model.chat_template)  # fails here rather than in every task
    check_dedup(config.data.dedup)
    table, parts, counts, dropped = _write_store(config, run_dir, model_dir, corpus)
    index, counts["duplicate_ids"] = _index(table, parts, config.data, config.seed)
    index.save(run_dir.store / "index.parquet")
    plan = plan_for(config, index, model_dir, plan_settings(config, world_size=config.train.max_workers))
    plan.save(run_dir.plan)
    if config.packing.write_blocks:
        steps_per_file = config.packing.steps_per_file or steps_for_block(plan)
        _write_packed(run_dir, plan, parts=parts, steps_per_file=steps_per_file)
    elif run_dir.packed.exists():
        remove_blocks(run_dir.packed)
    planned = np.unique(plan.example_rows).size
    uses = use_of_sources(index, config.mixture, config.corpus.named, seed=config.seed, epochs=config.train.epochs)
    counts |= {
        "heldout": int(index.heldout.sum()),
        "planned": planned,
        "tokens": int(index.length.sum()),
        "targets": int(index.num_targets.sum()),
        "packs": plan.num_packs,
        "steps": plan.num_steps,
        "fill": plan.fill(),
        "time_over_ideal": plan.time_over_ideal(),
        "carried": plan.num_carried,
    }
    for name, use in uses.items():
        if config.corpus.sources:
            counts |= {f"examples.{name}": use.examples, f"tokens.{name}": use.tokens}
        dropped |= {f"{reason}.{name}": number for reason, number in use.left_out.items()}
    if left := sum(use.available - sum(use.left_out.values()) for use in uses.values()) - planned:
        dropped["beyond_max_steps"] = left
    return Prepared(counts, dropped)


def plan_for(config: RunConfig, index: ExampleIndex, model_dir: Path, settings: PlanSettings) -> StepPlan:
    """The plan of the recipe's examples under `settings`."""

    def rows(epoch: int) -> np.ndarray:
        return training_rows(index, config.mixture, config.corpus.named, seed=config.seed, epoch=epoch)[0]

    return make_plan(index, settings, cost=sequence_cost(model_shape(model_dir)), rows=rows)


def plan_settings(config: RunConfig, *, world_size: int, strategy: str | None = None) -> PlanSettings:
    """What the recipe says about its plan. A strategy that `auto` chose before is to be named, for equal steps."""
    return PlanSettings(
        strategy=strategy or config.packing.strategy,
        balance=config.balance,
        capacity=config.packing.capacity,
        packs_per_step=config.packing.packs_per_step,
        world_size=world_size,
        sp_degree=config.train.sp_degree,
        fill=config.packing.fill,
        group_size=config.packing.group_size,
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
    config: RunConfig, run_dir: RunDir, model_dir: Path, corpus: Mapping[str, SourceConfig]
) -> tuple[pa.Table, tuple[str, ...], dict[str, int | float], dict[str, int]]:
    """Tokenises the corpus, a task a slice; returns the index rows in the order of the corpus, the names of the store's
    files, counts, and what was dropped.

    A slice whose part is there is not read again: a killed `prepare` continues, and one with other files or packing
    settings starts from the tokens. Files that cannot be read stop it after all other slices are done.
    """
    endpoint, store = config.corpus.storage_endpoint, run_dir.store
    evaluation = EvaluationRuns.of(
        evaluation_texts(config.data.decontaminate.paths, endpoint=endpoint), config.data.decontaminate.ngram
    )
    tokenising = tokenising_state(model_dir, config.model.chat_template)
    contents = [
        config.data.model_dump(exclude={"heldout_fraction", "max_heldout"}),
        config.corpus.role_order,
        hashlib.sha256(evaluation.hashes.tobytes()).hexdigest(),
        tokenising,
    ]
    parts, problems = store_parts(config.corpus, corpus, source_files(config.corpus, corpus), contents)
    if not parts and not problems:
        paths = ", ".join(path for source in corpus.values() for path in source.paths)
        raise CorpusError(f"the corpus is empty: {paths}; give files with one conversation a line")
    settings = {
        "data": config.data.model_dump(),
        "role_order": config.corpus.role_order,
        "model_dir": str(model_dir.resolve()),
        "chat_template": config.model.chat_template,
        "tokenising": digest(tokenising),
        "store": str(store.resolve()),
    }
    store.mkdir(parents=True, exist_ok=True)
    remove_others(store, None if problems else {part.name for part in parts})
    with whole_file(store / EVALUATION_FILE) as temporary, temporary.open("wb") as file:
        np.save(file, evaluation.hashes)
    tasks = list({part.name: part.task for part in parts}.values())
    with progress("prepare: slices tokenised", len(tasks)) as bar:
        for done, row in enumerate(_each(tasks, tokenise_slice, settings), 1):
            problems += [row["problem"]] if row["problem"] else []
            bar.advance(done)
    if problems:  # the slices that went well are kept
        raise CorpusError(listed(sorted(set(problems))))
    tables = [pq.read_table(index_file(store, part.name)) for part in parts]
    numbers = np.repeat(np.arange(len(parts), dtype=np.int32), [len(table) for table in tables])
    found = pa.concat_tables(tables).append_column("file", pa.array(numbers))
    table, duplicates = without_duplicates(found, [printable(part.slice.path) for part in parts], config.data.dedup)
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    num_bad, first_rejects = 0, []
    with whole_file(run_dir.rejects) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, part in enumerate(parts):
            summary = json.loads(summary_file(store, part.name).read_text(encoding="utf-8"))
            counts.update(summary["counts"])
            for reject in sorted(summary["rejects"] + duplicates.get(number, []), key=lambda reject: reject["line"]):
                file.write(json.dumps(reject, ensure_ascii=False) + "\n")
                dropped[reject["reason"]] += 1
                num_bad += reject["reason"] not in NOT_BROKEN
                first_rejects += [reject] if len(first_rejects) < 3 else []
    _check_rejects(config, run_dir, first_rejects, num_bad, counts)
    counts["examples"] -= len(found) - len(table)
    if evaluation.num_texts:
        counts |= {"evaluation_texts": evaluation.num_texts, "evaluation_texts_too_short": evaluation.num_short_texts}
    sources = pa.array([part.source for part in parts], pa.string())
    table = table.select(INDEX_COLUMNS).append_column("source", sources.take(table["file"].combine_chunks()))
    names = tuple(tokens_file(store, part.name).name for part in parts)
    return table, names, dict(counts), dict(sorted(dropped.items()))


def _each(items: list[dict[str, Any]], function: Any, settings: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Runs `function(item, settings)` on every item as one Ray Data task each; results as they finish."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(function, fn_args=[settings])
    return dataset.iter_rows()


def _check_rejects(
    config: RunConfig, run_dir: RunDir, first_rejects: list[dict[str, Any]], num_bad: int, counts: Counter[str]
) -> None:
    first = "; ".join(f"{r['file']}, line {r['line']}: {r['detail']}" for r in first_rejects)
    if num_bad > config.corpus.max_bad_fraction * counts["records"]:
        raise CorpusError(
            f"{num_bad} of {counts['records']} records are broken, and corpus.max_bad_fraction = "
            f"{config.corpus.max_bad_fraction}: mend them (all are in {run_dir.rejects}) or raise it. First: {first}"
        )
    if counts["examples"] == 0:
        raise CorpusError(f"the corpus has no usable conversation{'; first reject: ' + first if first else ''}")


def _index(table: pa.Table, parts: tuple[str, ...], data: DataConfig, seed: int) -> tuple[ExampleIndex, int]:
    """The index, and the number of examples that had another's id."""
    example_id, num_renamed = unique_ids(table["example_id"])
    index = ExampleIndex(
        example_id=example_id,
        length=table["length"].to_numpy().astype(np.int32),
        num_targets=table["num_targets"].to_numpy().astype(np.int32),
        sum_weights=table["sum_weights"].to_numpy().astype(np.float64),
        file=table["file"].to_numpy().astype(np.int32),
        row=table["row"].to_numpy().astype(np.int32),
        source=table["source"].to_numpy(zero_copy_only=False),
        heldout=choose_heldout(example_id, fraction=data.heldout_fraction, at_most=data.max_heldout, seed=seed),
        parts=parts,
    )
    return index, num_renamed


def choose_heldout(example_id: np.ndarray, *, fraction: float, at_most: int, seed: int) -> np.ndarray:
    """bool[n]: the examples whose hash of (seed, id) is lowest, so that adding data moves few of them."""
    digests = [hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8] for name in example_id]
    order = np.argsort(np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64), kind="stable")
    chosen = np.zeros(len(example_id), dtype=np.bool_)
    chosen[order[: min(round(fraction * len(example_id)), at_most)]] = True
    return chosen


def _write_packed(run_dir: RunDir, plan: StepPlan, *, parts: tuple[str, ...], steps_per_file: int) -> None:
    """Sorts the store into plan order, a task a file of packs."""
    settings = {
        "store": str(run_dir.store.resolve()),
        "plan": str(run_dir.plan.resolve()),
        "packed": str(run_dir.packed.resolve()),
        "steps_per_file": steps_per_file,
        "layout": digest(plan.layout_digest, steps_per_file, parts),
    }
    num_files = num_packed_files(plan, steps_per_file)
    keep_if_same(run_dir.packed, settings["layout"])
    with progress("prepare: packed files written", num_files) as bar:
        items = [{"number": number} for number in range(num_files)]
        problems = []
        for done, row in enumerate(_each(items, write_packed_slice, settings), 1):
            problems += [row["problem"]] if row["problem"] else []
            bar.advance(done)
    if problems:
        raise LongAlignError(listed(sorted(set(problems))))
    write_layout(run_dir.packed, plan, steps_per_file=steps_per_file)
