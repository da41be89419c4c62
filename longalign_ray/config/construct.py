"""How long conversations are made of documents."""

from __future__ import annotations

from pydantic import PositiveInt, model_validator

from longalign_ray.config.section import Count, Section


class ConstructConfig(Section):
    """Long instruction data from documents; used when `corpus.paths` is empty."""

    num_long: PositiveInt = 96
    """Number of long conversations (a document and a task about it)."""
    num_short: Count = 32
    """Number of short chats taken from the set that ships with the package."""
    min_chars: PositiveInt = 1_500
    """Documents shorter than this many characters are not used."""
    max_chars: PositiveInt = 14_000
    """Documents are cut between definitions so that they stay below this many characters."""

    @model_validator(mode="after")
    def _lengths(self) -> ConstructConfig:
        if self.min_chars > self.max_chars:
            raise ValueError(
                f"construct.min_chars = {self.min_chars} is above construct.max_chars = {self.max_chars}: "
                f"lower min_chars or raise max_chars"
            )
        return self
