"""What is trained, made visible: an example with its targets coloured, a pack with its boundaries and positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from longalign_ray.data.store import FULL_WEIGHT, Example, Pack

if TYPE_CHECKING:
    from rich.text import Text

Decode = Callable[[np.ndarray], str]
"""Token ids -> text, special tokens shown."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Text of tokens with equal weight, per cent; 0 is no target."""

    text: str
    weight: int

    def shortened(self, max_chars: int | None) -> str:
        """The text, or its head and tail with the number of characters between them."""
        if max_chars is None or len(self.text) <= max_chars:
            return self.text
        half = max_chars // 2
        return f"{self.text[:half]} ... {len(self.text) - 2 * half:,} characters ... {self.text[-half:]}"


def segments(example: Example, decode: Decode) -> list[Segment]:
    """The example's text cut where the weight changes. The first token has weight 0, as nothing predicts it."""
    weights = example.loss_weight.copy()
    weights[:1] = 0
    edges = np.flatnonzero(np.diff(weights)) + 1
    runs = np.split(np.arange(example.length), edges)
    return [Segment(decode(example.input_ids[run]), int(weights[run[0]])) for run in runs if len(run)]


def show_segments(parts: Sequence[Segment], *, colour: bool, max_chars: int | None = None) -> Text:
    """Targets in green, or in [[ ]] without colour; weights other than 100 % in yellow and named."""
    from rich.text import Text

    shown = Text()
    for part in parts:
        text, label = part.shortened(max_chars), "" if part.weight == FULL_WEIGHT else f"{part.weight} %: "
        if part.weight == 0:
            shown.append(text, style="dim" if colour else "")
        elif colour:
            shown.append(label, style="bold black on yellow")
            shown.append(text, style="bold green" if part.weight == FULL_WEIGHT else "yellow")
        else:
            shown.append(f"[[{label}{text}]]")
    return shown


def show_example(example: Example, decode: Decode, *, note: str, colour: bool, max_chars: int | None) -> Text:
    """A line about the example, then its text."""
    from rich.text import Text

    head = (
        f"{example.example_id}: {note}{example.length:,} tokens, {example.num_targets:,} targets "
        f"of weight {example.sum_weights:,.2f} in all\n"
    )
    return Text(head, style="bold" if colour else "") + show_segments(
        segments(example, decode), colour=colour, max_chars=max_chars
    )


def sequences(pack: Pack) -> list[Example]:
    """The sequences of a pack."""
    bounds = zip(pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist(), strict=True)
    return [
        Example(name, pack.input_ids[start:end], pack.loss_weight[start:end])
        for name, (start, end) in zip(pack.example_ids, bounds, strict=True)
    ]


def show_pack(pack: Pack, decode: Decode, *, place: str, colour: bool, max_chars: int | None) -> Text:
    """Every sequence with its place in the pack and its positions, which start anew at each boundary."""
    from rich.text import Text

    parts = sequences(pack)
    num_targets = sum(part.num_targets for part in parts)
    shown = Text(
        f"{place}: {len(parts)} sequences, {len(pack.input_ids):,} tokens, {num_targets:,} targets; "
        f"cu_seqlens {pack.cu_seqlens.tolist()}",
        style="bold" if colour else "",
    )
    for start, part in zip(pack.cu_seqlens.tolist(), parts, strict=False):
        line = f"\n--- tokens {start} to {start + part.length - 1}, positions 0 to {part.length - 1} ---\n"
        shown.append(line, style="cyan" if colour else "")
        shown += show_example(part, decode, note="", colour=colour, max_chars=max_chars)
    return shown
