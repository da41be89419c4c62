"""Fast tokenizers of four kinds for tests: bytes, a trained unigram, SentencePiece BPE and byte BPE of real models."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tests.tiny_model import CHAT_TEMPLATE, write_tiny_tokenizer

KINDS = ("bytes", "unigram", "mistral", "qwen")


def make_tokenizer(kind: str, *, scratch: Path, data: Path) -> Any:
    """A tokenizer with the chat template of the tiny model; `mistral` and `qwen` are made from files below `data`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if kind == "bytes":
        write_tiny_tokenizer(scratch)
        return AutoTokenizer.from_pretrained(scratch)
    core = {"unigram": _unigram, "mistral": _mistral, "qwen": _qwen}[kind](data)
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE)


def _unigram(data: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from longalign_ray.evaluate.haystack import default_haystack

    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore
    core.decoder = decoders.Metaspace()  # pyright: ignore
    trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    core.train_from_iterator(default_haystack(1, min_chars=20_000).split("\n"), trainer)
    return core


def _mistral(data: Path) -> Any:
    from tokenizers import Tokenizer, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    proto: Any = import_protobuf().ModelProto()  # pyright: ignore
    proto.ParseFromString((data / "tokenizers" / "mistral_v1.model").read_bytes())
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    merges = generate_merges(vocabulary, {piece.piece: piece.score for piece in proto.pieces})
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    core = Tokenizer(model)
    parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence(parts)  # pyright: ignore
    return core


def _qwen(data: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    # The first 30,000 ranks of 151,643 are a byte BPE of their own, and are made in a fifth of the time.
    lines = (data / "tokenizers" / "qwen.tiktoken").read_text(encoding="ascii").splitlines()[:30_000]
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    symbols = bytes_to_unicode()

    def name(token: bytes) -> str:
        return "".join(symbols[byte] for byte in token)

    def halves(token: bytes) -> tuple[str, str]:
        """The two tokens that byte pair encoding joins last."""
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda number: ranks.get(parts[number] + parts[number + 1], 1 << 30))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return name(parts[0]), name(parts[1])

    merges = [halves(token) for token in ranks if len(token) > 1]
    core = Tokenizer(models.BPE(vocab={name(token): rank for token, rank in ranks.items()}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    return core
