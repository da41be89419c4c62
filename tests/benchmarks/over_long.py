"""What each trainer does with conversations longer than its limit: which it drops, which answers it cuts, what is lost.

Twelve conversations that fit and three that do not: a long question, many turns, a long answer. Each trainer prepares
them at a limit of 1,536 tokens and at one that all fit; its own count of targets at the latter is the whole. Nothing is
trained. Packages and settings of the peers as in `peers`.
Run: python -m tests.benchmarks.over_long
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from longalign_ray.config import DataConfig
from longalign_ray.data.conversation import Conversation, Message, RecordError
from longalign_ray.data.template import load_tokenizer
from longalign_ray.data.tokenize import ConversationTokenizer
from tests.benchmarks.peers import CAPACITY, install_peer, llama_factory, model_of, run_with, settings, write_model

NO_LIMIT = 8_192
Chats = list[list[dict[str, str]]]


def chats() -> Chats:
    def turns(*lengths: int) -> list[dict[str, str]]:
        """So many sentences of the user and of the assistant in turn."""
        roles = ("user", "assistant")
        system = [{"role": "system", "content": "You answer."}]
        return system + [
            {"role": roles[number % 2], "content": " ".join(f"Line {n} of {length}." for n in range(length))}
            for number, length in enumerate(lengths)
        ]

    return [turns(5 + n, 3 + n) for n in range(12)] + [turns(400, 10), turns(*[30, 20] * 8), turns(10, 400)]


def ours(directory: Path, limit: int, too_long: str) -> list[int]:
    config = DataConfig.model_validate({"max_length": limit, "too_long": too_long})
    tokenizer = ConversationTokenizer(load_tokenizer(directory / "model"), config)
    kept = []
    for number, chat in enumerate(chats()):
        messages = tuple(Message(turn["role"], turn["content"]) for turn in chat)
        try:
            (example,) = tokenizer.one(Conversation(f"e{number}", messages, "benchmark")).examples
            kept.append(example.num_targets)
        except RecordError:  # counted by `prepare`, by its reason
            pass
    return kept


def of_trl(directory: Path, limit: int) -> list[int]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    tokenizer = ConversationTokenizer(load_tokenizer(directory / "model"), DataConfig(max_length=NO_LIMIT))
    rows = []
    for number, chat in enumerate(chats()):
        messages = tuple(Message(turn["role"], turn["content"]) for turn in chat)
        (example,) = tokenizer.one(Conversation(f"e{number}", messages, "benchmark")).examples
        mask = (example.loss_weight > 0).astype(int).tolist()
        rows.append({"input_ids": example.input_ids.tolist(), "completion_mask": mask})
    trainer = SFTTrainer(
        model=model_of(directory),
        args=settings(SFTConfig, directory, batch=1, max_length=limit, completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(directory / "model"),
    )
    return [sum(label != -100 for label in row["labels"]) for row in trainer.train_dataset]


def of_llama_factory(directory: Path, limit: int) -> list[int]:
    kept: list[int] = []
    for row in llama_factory(directory, chats(), cutoff=limit).train_dataset:
        pairs = zip(row["attention_mask"], row["labels"], strict=True)
        targets = Counter(sequence for sequence, label in pairs if label != -100)
        kept += [targets[sequence] for sequence in range(1, max(row["attention_mask"]) + 1)]
    return kept


TRAINERS: dict[str, Callable[[Path, int], list[int]]] = {
    "TRL SFTTrainer": of_trl,
    "LLaMA-Factory, neat_packing": of_llama_factory,
    **{
        f"longalign_ray, too_long: {policy}": lambda directory, limit, policy=policy: ours(directory, limit, policy)
        for policy in ("skip", "cut_left", "cut_middle", "cut_right")
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", nargs=2, metavar=("TRAINER", "DIRECTORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare, directory = TRAINERS[arguments.prepare[0]], Path(arguments.prepare[1])
        print(json.dumps([prepare(directory, limit) for limit in (NO_LIMIT, CAPACITY)]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch) / "model", layers=1)
        packages = {kind: install_peer(kind, Path(scratch) / kind) for kind in ("TRL", "LLaMA-Factory")}
        for name in TRAINERS:
            done = run_with(packages.get(name.split(" ")[0].rstrip(","), ""), "over_long", "--prepare", name, scratch)
            if done.returncode:
                rows.append(f"| {name}: not measured, {done.stderr.strip().splitlines()[-1][:200]} |{' - |' * 4}")
                continue
            whole, kept = json.loads(done.stdout.splitlines()[-1])
            cut = (Counter(kept) - Counter(whole)).total()
            lost = sum(whole) - sum(kept)
            rows.append(f"| {name} | {len(whole) - len(kept)} | {cut} | {lost:,} | {lost / sum(whole):.0%} |")
    print(f"{len(chats())} conversations, 3 of them longer than {CAPACITY:,} tokens\n")
    print("| trainer | conversations dropped | with targets cut off | targets lost | of all |\n|---|---|---|---|---|")
    print("\n".join(rows))
    print("\n`Trainer` with flattened sequences has no limit: it loses nothing, and its memory grows with the longest.")


if __name__ == "__main__":
    main()
