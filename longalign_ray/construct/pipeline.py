"""Ray Data glue: shelves of modules -> documents -> tasks, in parallel, and the conversations file.

Every random choice follows from the seed and the number of the shelf, so the result is the same however the work is
spread.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from longalign_ray.config import ConstructConfig
from longalign_ray.construct.documents import Shelf, cut_documents, module_files, module_name, shelves, stdlib_root
from longalign_ray.construct.pieces import Piece, pieces_of
from longalign_ray.construct.task_writer import user_message, write_task
from longalign_ray.errors import ConfigError, CorpusError
from longalign_ray.logs import progress

SHORT_CHATS = "short_chats.jsonl"
# Shelves read at first, for each conversation asked for: some give no document.
SHELVES_PER_CONVERSATION = 1.25


def construct(config: ConstructConfig, output: Path, *, seed: int) -> tuple[dict[str, int | float], dict[str, int]]:
    """Writes `num_long` + `num_short` conversations in an order drawn by seed; returns counts and what was dropped.

    Long ones are taken round by round: the first document of every shelf, then the second, so that few documents
    come from many modules. Ray is initialised already.
    """
    short = _short_chats(config.num_short, seed=seed)
    root = stdlib_root()
    files, num_excluded = module_files(root)
    if not files:
        raise CorpusError(
            f"construct: {root} holds no sources of the standard library; install them or set corpus.paths to your data"
        )
    planned = shelves(files, max_chars=config.max_chars, seed=seed)
    num_first = min(len(planned), int(SHELVES_PER_CONVERSATION * config.num_long) + 4)
    made, dropped = _write_shelves(planned[:num_first], config, seed=seed)
    if sum(row["round"] == 0 for row in made) < config.num_long:
        more, more_dropped = _write_shelves(planned[num_first:], config, seed=seed)
        made, dropped, num_first = made + more, dropped + more_dropped, len(planned)
    if len(made) < config.num_long:
        version = ".".join(map(str, sys.version_info[:3]))
        raise CorpusError(
            f"construct.num_long = {config.num_long} is above the {len(made)} documents of {config.min_chars} to "
            f"{config.max_chars} characters that the standard library of Python {version} gives: lower "
            f"construct.num_long or construct.min_chars, or set corpus.paths to your own data"
        )
    made.sort(key=lambda row: (row["round"], row["shelf"]))
    long, spare = made[: config.num_long], made[config.num_long :]
    not_used = {
        "files_excluded": num_excluded,
        "shelves_not_needed": len(planned) - num_first,
        "documents_not_chosen": len(spare),
    }
    conversations = [row["conversation"] for row in long] + short
    random.Random(f"order:{seed}").shuffle(conversations)
    _write_jsonl(output, conversations)
    return _counts(long, short) | not_used, {reason: number for reason, number in sorted(dropped.items()) if number}


def _write_shelves(
    planned: Sequence[Shelf], config: ConstructConfig, *, seed: int
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Conversations of the shelves, in any order, and what was dropped."""
    import ray

    if not planned:
        return [], Counter()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # It warns that there are no progress bars.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    num_cpus = int(ray.cluster_resources().get("CPU", 1))
    items = [{"shelf": shelf.shelf_id, "form": shelf.form, "files": list(shelf.files)} for shelf in planned]
    # Without a number of blocks, so few rows would be one block and so one task.
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), 4 * num_cpus)).map(
        partial(_write_shelf, min_chars=config.min_chars, max_chars=config.max_chars, seed=seed)
    )
    made: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    with progress("construct: shelves of modules", len(planned)) as bar:
        for number, row in enumerate(dataset.iter_rows(), start=1):
            made += json.loads(row["conversations"])
            dropped.update(json.loads(row["dropped"]))
            bar.advance(number)
    return made, dropped


def _write_shelf(row: dict[str, Any], *, min_chars: int, max_chars: int, seed: int) -> dict[str, str]:
    """Conversations about the documents of one shelf, as JSON text: their shape is no matter for Arrow."""
    shelf = Shelf(row["shelf"], row["form"], tuple(row["files"]))
    modules, dropped = _read_modules(shelf)
    rng = random.Random(f"cut:{seed}:{shelf.shelf_id}")
    documents, not_cut = cut_documents(shelf, modules, min_chars=min_chars, max_chars=max_chars, rng=rng)
    dropped += not_cut
    conversations = []
    for number, document in enumerate(documents):
        rng = random.Random(f"task:{seed}:{document.document_id}")
        task = write_task(document, rng)
        if task is None:
            dropped["documents_without_task"] += 1
            continue
        messages = [{"role": "user", "content": user_message(task, rng)}, {"role": "assistant", "content": task.answer}]
        source = f"Python standard library, PSF licence: {', '.join(document.modules)}"
        conversation = {"id": f"{document.document_id}-{task.kind}", "source": source, "messages": messages}
        conversations.append(
            {"shelf": shelf.shelf_id, "round": number, "kind": task.kind, "conversation": conversation}
        )
    return {"conversations": json.dumps(conversations, ensure_ascii=False), "dropped": json.dumps(dropped)}


def _read_modules(shelf: Shelf) -> tuple[dict[str, list[Piece]], Counter[str]]:
    modules: dict[str, list[Piece]] = {}
    dropped: Counter[str] = Counter()
    for file in shelf.files:
        name = module_name(file)
        try:
            # A form feed separates sections in some old modules; it is no text.
            text = (stdlib_root() / file).read_text(encoding="utf-8").replace("\f", "")
            modules[name] = pieces_of(text, module=name, form=shelf.form)
        except OSError:
            dropped["files_unreadable"] += 1
        except UnicodeDecodeError:
            dropped["files_not_utf8"] += 1
        except (SyntaxError, ValueError):
            dropped["files_unparsable"] += 1
    return modules, dropped


def _short_chats(count: int, *, seed: int) -> list[dict[str, Any]]:
    """`count` of the chats that ship with the package, chosen by seed."""
    text = resources.files("longalign_ray.construct").joinpath(SHORT_CHATS).read_text(encoding="utf-8")
    chats = [json.loads(line) for line in text.splitlines()]
    if count > len(chats):
        raise ConfigError(
            f"construct.num_short = {count} is above the {len(chats)} short chats of the package: set it to "
            f"{len(chats)} or less, or set corpus.paths to your own data"
        )
    chosen = random.Random(f"short:{seed}").sample(chats, count)
    return [{"id": chat["id"], "source": "longalign_ray short chats", "messages": chat["messages"]} for chat in chosen]


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Through a temporary file, so that a reader sees either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def _counts(long: Sequence[dict[str, Any]], short: Sequence[dict[str, Any]]) -> dict[str, int | float]:
    long_chars = [_num_chars(row["conversation"]) for row in long]
    by_kind = Counter(row["kind"] for row in long)
    return {
        "conversations": len(long) + len(short),
        "long": len(long),
        "short": len(short),
        "characters": sum(long_chars) + sum(map(_num_chars, short)),
        "longest_characters": max(long_chars),
        **{f"task_{kind}": number for kind, number in sorted(by_kind.items())},
    }


def _num_chars(conversation: dict[str, Any]) -> int:
    return sum(len(message["content"]) for message in conversation["messages"])
