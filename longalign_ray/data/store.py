"""The token store and the packed blocks: Arrow IPC files, uncompressed and memory-mapped, one row an example.

In the store, rows stand in the order of the corpus. In a packed block each record batch is one pack of a plan, so that
a rank reads its packs from one contiguous place. Suffixes: T tokens of a pack, S sequences of a pack.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longalign_ray.errors import PackFormatError
from longalign_ray.run_dir import whole_file

SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("input_ids", pa.large_list(pa.int32())),
        ("loss_weight", pa.large_list(pa.uint8())),  # per cent
    ]
)
STORE_FORMAT = 1
"""Part of every store's digest: raise it with each change of what is made of a conversation, or of its files."""
BYTES_PER_TOKEN = 5  # an id and its weight
ROWS_PER_BATCH = 1_024
TOKENS_PER_BATCH = 1 << 20
INDEX_FILE = "index.parquet"
MAX_OPEN_FILES = 256  # maps of a reader at a time: each has a file descriptor, of which a process often has 1,024
FULL_WEIGHT = 100
"""loss_weight of a token that counts in full."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenised conversation. Token t is a target where loss_weight[t] > 0."""

    example_id: str
    input_ids: np.ndarray
    """int32[length]."""
    loss_weight: np.ndarray
    """uint8[length], per cent, so that weights in steps of 0.01 are exact."""

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """N_i: targets that something predicts, so not the first token."""
        return int(np.count_nonzero(self.loss_weight[1:]))

    @property
    def sum_weights(self) -> float:
        """Sum of the targets' weights, in whole tokens."""
        return int(self.loss_weight[1:].sum(dtype=np.int64)) / FULL_WEIGHT


@dataclass(frozen=True, slots=True, eq=False)
class ExampleIndex:
    """What a plan needs to know: a row an example, in store order."""

    example_id: np.ndarray
    """object[n] of str."""
    length: np.ndarray
    """int32[n]."""
    num_targets: np.ndarray
    """int32[n]."""
    sum_weights: np.ndarray
    """float64[n]: sum of the targets' weights, in whole tokens."""
    file: np.ndarray
    """int32[n]: number of the store file, a place in `parts`."""
    row: np.ndarray
    """int32[n]: row in that file."""
    source: np.ndarray
    """object[n] of str: name of the corpus entry it came from."""
    heldout: np.ndarray
    """bool[n]: kept out of training."""
    parts: tuple[str, ...] = ()
    """Names of the store's files, in the order of the corpus."""

    def __len__(self) -> int:
        return len(self.length)

    def save(self, path: Path) -> None:
        """Writes the columns, with the names of the parts beside the schema."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "parts"]
        table = pa.table({name: pa.array(getattr(self, name)) for name in names})
        with whole_file(path) as temporary:
            table = table.replace_schema_metadata({"parts": json.dumps(self.parts)})
            pq.write_table(table, temporary, compression="zstd")

    @staticmethod
    def load(path: Path) -> ExampleIndex:
        """Raises PackFormatError where there is no such index."""
        names = [field.name for field in dataclasses.fields(ExampleIndex) if field.name != "parts"]
        table, parts = _read_index(path, names)
        return ExampleIndex(**{name: table[name].to_numpy() for name in names}, parts=parts)


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Sequences laid end to end. What a sequence counts follows from loss_weight and the boundaries."""

    input_ids: np.ndarray
    """int32[T]."""
    loss_weight: np.ndarray
    """uint8[T], per cent."""
    cu_seqlens: np.ndarray
    """int32[S+1], first 0, last T."""
    example_ids: tuple[str, ...]

    @staticmethod
    def of(examples: Sequence[Example]) -> Pack:
        """The examples end to end, e.g. lengths 3 and 2 -> cu_seqlens [0, 3, 5]."""
        lengths = [example.length for example in examples]
        return Pack(
            input_ids=np.concatenate([example.input_ids for example in examples]),
            loss_weight=np.concatenate([example.loss_weight for example in examples]),
            cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            example_ids=tuple(example.example_id for example in examples),
        )


def part_name(number: int) -> str:
    return f"part-{number:05d}.arrow"


def write_batches(path: Path, batches: Iterable[Sequence[Example]]) -> None:
    """Writes a file with one record batch for each list of examples; it appears whole or not at all."""
    with (
        whole_file(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        for examples in batches:
            writer.write_batch(_record_batch(examples))


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Writes a store file; of the examples only one record batch is held at a time."""
    write_batches(path, _in_batches(examples))


def _in_batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    held: list[Example] = []
    num_tokens = 0
    for example in examples:
        held.append(example)
        num_tokens += example.length
        if len(held) == ROWS_PER_BATCH or num_tokens >= TOKENS_PER_BATCH:
            yield held
            held, num_tokens = [], 0
    if held:
        yield held


def _record_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    offsets = np.concatenate([[0], np.cumsum([example.length for example in examples], dtype=np.int64)])

    def lists(arrays: list[np.ndarray], dtype: type) -> pa.LargeListArray:
        values = np.concatenate(arrays) if arrays else np.empty(0)
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values.astype(dtype)))

    columns = [
        pa.array([example.example_id for example in examples], pa.string()),
        lists([example.input_ids for example in examples], np.int32),
        lists([example.loss_weight for example in examples], np.uint8),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


class BatchFile:
    """A memory-mapped file of `write_batches`; nothing is read before it is asked for."""

    def __init__(self, path: Path):
        """Raises PackFormatError where `path` is missing or holds something else."""
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        except (OSError, pa.ArrowInvalid) as error:
            raise PackFormatError(f"{path} cannot be read ({error}); run `longalign prepare` again") from error
        if self._reader.schema != SCHEMA:
            raise PackFormatError(f"{path} has the columns {self._reader.schema.names}, not {SCHEMA.names}")

    @cached_property
    def batch_starts(self) -> np.ndarray:
        """int64[batches+1]: rows before each batch, and the number of rows last."""
        rows = [self._reader.get_batch(number).num_rows for number in range(self._reader.num_record_batches)]
        return np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])

    def examples(self, batch_number: int) -> list[Example]:
        """All rows of one record batch; the arrays are read-only views of the file."""
        batch = self._reader.get_batch(batch_number)
        return [_example(batch, row) for row in range(batch.num_rows)]

    def example(self, row: int) -> Example:
        number = int(np.searchsorted(self.batch_starts, row, side="right")) - 1
        return _example(self._reader.get_batch(number), row - int(self.batch_starts[number]))


def _example(batch: pa.RecordBatch, row: int) -> Example:
    ids, weights = batch.column(1), batch.column(2)
    first, last = ids.offsets[row].as_py(), ids.offsets[row + 1].as_py()
    return Example(
        batch.column(0)[row].as_py(),
        ids.values.slice(first, last - first).to_numpy(),
        weights.values.slice(first, last - first).to_numpy(),
    )


class TokenStore:
    """A directory of store files with its index; examples are read by their row in the index."""

    def __init__(self, directory: Path):
        """Raises PackFormatError where there is no index. Of its columns only what finds an example is read here."""
        self.directory = directory
        table, self._parts = _read_index(directory / INDEX_FILE, ["example_id", "file", "row"])
        self._names = table["example_id"]
        self._file, self._row = table["file"].to_numpy(), table["row"].to_numpy()
        self._open = lru_cache(maxsize=MAX_OPEN_FILES)(lambda number: BatchFile(directory / self._parts[number]))

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def index(self) -> ExampleIndex:
        return ExampleIndex.load(self.directory / INDEX_FILE)

    def example(self, row: int) -> Example:
        """The example of index row `row`, with its name in the index, where names are unique.

        Raises PackFormatError where its file is missing or broken.
        """
        example = self._open(int(self._file[row])).example(int(self._row[row]))
        return Example(self._names[row].as_py(), example.input_ids, example.loss_weight)


def _read_index(path: Path, columns: Sequence[str] | None = None) -> tuple[pa.Table, tuple[str, ...]]:
    """Columns of an index (None: all), and the names of the store's files."""
    try:
        table = pq.read_table(path, columns=columns)
        return table, tuple(json.loads(table.schema.metadata[b"parts"]))
    except (OSError, pa.ArrowInvalid, KeyError, TypeError) as error:
        raise PackFormatError(f"{path} is no index of a token store ({error}); run `longalign prepare`") from error
