"""CPU seconds of `prepare`'s tasks, all that one does with a slice, beside those of tokenising alone.

Corpus: 10,000 short chats and 200 long documents, each with a question about it, out of the real data beside the
checkout. The yardstick is `tokenizers.Tokenizer.encode_batch`, which finds offsets, on the same rendered texts; its
result is not even read. One process, one thread, no Ray; the least of several rounds, the two in turns.
Run: python -m tests.benchmarks.prepare_cost [bundled:smollm2-135m-instruct | MODEL_DIR] [--rounds 3]
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pyarrow.parquet as pq

from longalign_ray.config import CorpusConfig, DataConfig
from longalign_ray.data.conversation import RecordError, parse_record
from longalign_ray.data.corpus import corpus_files, cut_into_slices
from longalign_ray.data.slice_store import EVALUATION_FILE, index_file, summary_file, tokenise_slice
from longalign_ray.data.template import load_tokenizer
from longalign_ray.model_source import local_model_dir
from tests.conftest import SHARED_DATA

NUM_CHATS, NUM_DOCUMENTS = 10_000, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if not SHARED_DATA.is_dir():
        print(f"left out: no real data at {SHARED_DATA}")
        return
    model_dir = local_model_dir(arguments.model)
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus.jsonl"
        texts = write_corpus(corpus, load_tokenizer(model_dir))
        core = load_tokenizer(model_dir).backend_tokenizer
        store = Path(directory) / "store"
        store.mkdir()
        measure(corpus, store, model_dir, texts, core, arguments.rounds)


def measure(corpus: Path, store: Path, model_dir: Path, texts: list[str], core: Any, rounds: int) -> None:
    [file] = corpus_files([str(corpus)])
    slices = {f"part-{number}": part for number, part in enumerate(cut_into_slices(file))}
    settings = {
        "data": DataConfig(max_length=131_072).model_dump(),
        "role_order": CorpusConfig().role_order,
        "model_dir": str(model_dir),
        "chat_template": None,
        "tokenising": "",
        "store": str(store),
    }
    np.save(store / EVALUATION_FILE, np.empty(0, np.uint64))

    def prepare() -> None:
        for name, part in slices.items():
            summary_file(store, name).unlink(missing_ok=True)  # a slice that is done is left as it is
            item = {"name": name, "setting": "corpus.paths", "style": "auto", **dataclasses.asdict(part)}
            if problem := tokenise_slice(item, settings)["problem"]:
                raise SystemExit(problem)

    def encode() -> None:
        for first in range(0, len(texts), 256):
            core.encode_batch(texts[first : first + 256], add_special_tokens=False)

    prepare()
    seconds: dict[str, list[float]] = {"encode_batch": [], "prepare": []}
    for _ in range(rounds):
        seconds["encode_batch"].append(cpu_seconds(encode))
        seconds["prepare"].append(cpu_seconds(prepare))
    lengths = [pq.read_table(index_file(store, name))["length"].to_numpy() for name in slices]
    num_tokens = int(np.concatenate(lengths).sum())
    best = {name: min(values) for name, values in seconds.items()}
    print(
        f"{len(texts):,} conversations, {sum(map(len, lengths)):,} examples, {num_tokens:,} tokens, "
        f"{corpus.stat().st_size / 1e6:.0f} MB; {model_dir.name}\n"
    )
    print("| | CPU s | CPU s a million tokens | ratio |\n|---|---|---|---|")
    for name, value in best.items():
        print(f"| {name} | {value:.2f} | {value / num_tokens * 1e6:.2f} | {value / best['encode_batch']:.2f} |")


def cpu_seconds(work: Callable[[], None]) -> float:
    gc.collect()
    started = time.process_time()
    work()
    return time.process_time() - started


def write_corpus(path: Path, tokenizer: Any) -> list[str]:
    """Writes the corpus; returns the text of every conversation as the template makes it."""
    chats = []
    for file in sorted((SHARED_DATA / "chat").glob("*.jsonl")):
        chats += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    texts: list[str] = []
    with path.open("w", encoding="utf-8") as out:

        def add(record: dict[str, Any]) -> bool:
            try:
                talk = parse_record(record, source="corpus", line_number=1)
            except RecordError:
                return False
            texts.append(tokenizer.apply_chat_template(talk.as_dicts(), tokenize=False))
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            return True

        plain = (chat for chat in itertools.cycle(chats) if "tools" not in chat)
        num_chats = 0
        while num_chats < NUM_CHATS:
            num_chats += add(next(plain))
        with (SHARED_DATA / "documents.jsonl").open(encoding="utf-8") as documents:
            for line in itertools.islice(documents, NUM_DOCUMENTS):
                document = json.loads(line)
                question = {"role": "user", "content": f"{document['text']}\n\nWhat is the title of this text?"}
                add({"id": document["id"], "messages": [question, {"role": "assistant", "content": document["title"]}]})
    return texts


if __name__ == "__main__":
    main()
