"""What becomes of conversations: tokens, targets and packs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from longalign_ray.config.section import Count, Fraction, Section


class DedupConfig(Section):
    """Which of several equal or similar conversations is left out: all but the first in the order of the corpus."""

    method: Literal["none", "exact", "near"] = "none"
    """`exact`: equal text of all turns but the system's; `near`: also a Jaccard similarity of `threshold` or more,
    estimated by MinHash (needs the extra `dedup`)."""
    threshold: Annotated[float, Field(ge=0.1, le=1.0)] = 0.8
    """Share of word sequences in common, out of all that either has."""
    shingle_words: PositiveInt = 5
    """Words of a sequence; a Chinese or Japanese character is a word."""
    num_permutations: Annotated[int, Field(ge=16, le=1_024)] = 128
    """Values of a signature, 4 bytes each. The estimate's standard error is sqrt(s (1 - s) / num_permutations): 0.035
    at a similarity of 0.8."""

    @model_validator(mode="before")
    @classmethod
    def _method_alone(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value


class DecontaminateConfig(Section):
    """Evaluation sets that training must not have seen."""

    paths: tuple[str, ...] = ()
    """JSONL or JSON files, of which every string is taken, or text files; globs allowed. Empty: nothing is checked."""
    ngram: Annotated[int, Field(ge=2)] = 13
    """A conversation that shares this many words in a row with an evaluation text is left out; a Chinese or Japanese
    character is a word. 13 as for GPT-3 (Brown et al. 2020, appendix C)."""


class DataConfig(Section):
    """From conversations to examples."""

    max_length: PositiveInt = 4_096
    """Longest example in tokens."""
    too_long: Literal["skip", "cut_right", "cut_left", "cut_middle", "error"] = "skip"
    """What happens to a longer conversation. `skip`: counted as a reject; `cut_right`: its end is cut; `cut_left`: the
    oldest exchanges go, then the beginning of the last question, but no system message; `cut_middle`: the middle of its
    longest message of a user or a tool; `error`: the run stops. Where that is not long enough, all three cut the end
    too. Cuts are counted: `cut_examples`, `cut_tokens`, and `cut_answers` where the cut end held targets. Documents
    without messages are cut into consecutive examples instead."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which turns are targets, with the token that ends each: the assistant's, its last, or all and the template's text
    between them. A message with a `loss_weight` of its own is weighed by that."""
    prompt_loss_weight: Fraction = 0.0
    """Weight of all other tokens, in steps of 0.01."""
    heldout_fraction: Fraction = 0.05
    """Share of examples kept out of training, chosen by seed, for the held-out loss."""
    max_heldout: Count = 64
    """At most this many held-out examples."""
    dedup: DedupConfig = DedupConfig()
    """Removal of duplicates; the method alone may stand here: `dedup: near`."""
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    """Removal of what is in evaluation sets."""

    @field_validator("prompt_loss_weight")
    @classmethod
    def _whole_per_cent(cls, value: float) -> float:
        if abs(100 * value - round(100 * value)) > 1e-6:
            raise ValueError(
                f"data.prompt_loss_weight = {value} is no multiple of 0.01, in which the store keeps weights: round it"
            )
        return value


class PackingConfig(Section):
    """From examples to packs."""

    strategy: Literal["deal", "best_fit", "streaming", "next_fit", "sorted", "naive", "auto"] = "deal"
    """`deal`: a random set of examples a step, dealt to the ranks by cost. Full packs, shuffled: `best_fit`,
    `streaming` (in one pass), `next_fit` (the paper's). One example a pack: `sorted` (the paper's groups of like
    length) and `naive`. `auto`: `deal` or `best_fit`, whichever comes nearer to ideal time."""
    balance: Literal["auto", "lock_step", "sums", "none"] = "auto"
    """When ranks wait for each other: in every micro-step (`lock_step`, ZeRO-2 and 3) or once a step (`sums`, ZeRO-0
    and 1); `auto` goes by train.zero_stage. `none`: packs run in the order planned."""
    fill: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Share of the capacity that `deal` fills. Empty room costs no time; less of it leaves less choice."""
    group_size: PositiveInt = 8
    """Examples of like length that `sorted` keeps together: one a rank."""
    capacity: PositiveInt = 4_096
    """Tokens that a rank holds in a micro-step at most; a pack has this many for each of `train.sp_degree` ranks."""
    packs_per_step: PositiveInt = 8
    """Packs of one optimizer step over all ranks and micro-steps; independent of the number of ranks."""
    write_blocks: bool = True
    """Sort the store into packed blocks, which a rank reads from one end to the other: a second copy of the tokens for
    each epoch, so ten for train.epochs=10, at 5 bytes a token. `false`: training reads each example from its place in
    the store, which suits a local disk."""
    steps_per_file: PositiveInt | None = None
    """Optimizer steps whose packs share one file of packed blocks; none: as many as fill 16 MB."""
