"""Where conversations come from, and how much of each source."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from longalign_ray.config.section import Count, Fraction, Section, Style

DEFAULT_SOURCE = "corpus"


class SourceConfig(Section):
    """One named part of the corpus."""

    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files or patterns, as in `corpus.paths`."""
    style: Style | None = None
    """How its records are written; none: as `corpus.style` says."""
    weight: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None
    """Its share of an epoch relative to the other sources', by `mixture.by`; every source has a weight or none has."""
    repeat: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    """Passes over it in an epoch; with weights, the most passes. 1.5: every example once, half of them twice."""
    max_examples: PositiveInt | None = None
    """At most this many different examples of it are used, chosen by seed, the same ones in every epoch."""


class CorpusConfig(Section):
    """Where the conversations come from."""

    paths: tuple[str, ...] = ()
    """JSONL, JSON arrays or Parquet, each also .gz or .zst: paths, globs, s3:// and gs:// addresses, or data sets of
    the Hugging Face hub (`org/name`, `hf://org/name?split=train`), at its newest commit or `&revision=COMMIT`. Empty:
    the output of `construct`."""
    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    """Several named sources in place of `paths`, to be mixed: `{chat: {paths: [...], weight: 0.9}, long: {...}}`."""
    style: Style = "auto"
    """How the records are written (see data/record_styles.py); `auto` tells by their keys, record by record."""
    role_order: Literal["alternate", "any"] = "alternate"
    """`alternate`: a record in which a user's or an assistant's turn follows one of its own kind, or the assistant
    begins, is broken; `any` takes such records as they are."""
    storage_endpoint: str | None = None
    """Address of the object store behind s3:// or gs:// paths where it is not Amazon's or Google's own, such as
    http://minio:9000; none: AWS_ENDPOINT_URL or STORAGE_EMULATOR_HOST of the environment, if set."""
    max_bad_fraction: Fraction = 0.1
    """The run stops when more than this share of the records is broken (see rejects.jsonl)."""

    @model_validator(mode="after")
    def _sources(self) -> CorpusConfig:
        if self.paths and self.sources:
            raise ValueError("corpus.sources and corpus.paths are both given: name the paths as one more source")
        weights = [source.weight for source in self.sources.values() if source.weight is not None]
        if weights and len(weights) < len(self.sources):
            without = ", ".join(name for name, source in self.sources.items() if source.weight is None)
            raise ValueError(f"corpus.sources has weights, but not for {without}: give each source a weight, or none")
        if weights and sum(weights) == 0:
            raise ValueError("corpus.sources has the weight 0 everywhere: give at least one source a weight above 0")
        return self

    @property
    def named(self) -> dict[str, SourceConfig]:
        """All sources by name; `paths` are one that is called `corpus`. Empty where neither is given."""
        sources = {DEFAULT_SOURCE: SourceConfig(paths=self.paths)} if self.paths else self.sources
        return {
            name: source.model_copy(update={"style": source.style or self.style}) for name, source in sources.items()
        }

    def setting_of(self, source: str) -> str:
        """Full name of the setting that has the paths of a source."""
        return f"corpus.sources.{source}.paths" if self.sources else "corpus.paths"


class MixtureConfig(Section):
    """How the sources of the corpus make up an epoch; see data/mixture.py for the rules of rounding."""

    by: Literal["examples", "tokens"] = "examples"
    """What the weights of `corpus.sources` share out."""
    max_long_examples: Count | None = None
    """At most this many different examples of `long_from` tokens or more, over all sources, chosen by seed. A smaller
    number takes a part of a larger one's, as in the paper's Table 2: 0, 5_000 or 10_000 long ones beside all short
    ones (LongAlign-0k, -5k and -10k: 3.73, 5.97 and 6.21 points on LongBench-Chat)."""
    long_from: PositiveInt = 8_192
    """Tokens from which an example counts as long; the paper's long examples have 8k to 64k tokens."""
