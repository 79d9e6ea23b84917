"""The manifest: one row for every hand of every source file, those that cannot be used with the reason why.

A manifest is what ingest writes and everything downstream reads instead of the sources: where a hand's picture lies,
what its labels are after cleaning, and the digests that decide whether a cached answer is still the answer to it.
Shards are cut from it here, so that what a shard is follows from the manifest alone.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.durable import write_bytes_atomic
from storage.errors import DamageError

Role = Literal["train", "evaluate"]


def _field(name: str, kind: pa.DataType, what: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"what": what})


SCHEMA = pa.schema(
    [
        _field("sample_id", pa.string(), "<data set>:<key>#<hand>: unique, and the join key of everything downstream"),
        _field("dataset", pa.string(), "name in pipeline.yaml"),
        _field("source", pa.string(), "tar or npz; relative paths start at the configuration file's folder"),
        _field("source_sha256", pa.string(), "of the whole source file"),
        _field("key", pa.string(), "the picture's name in its source, without extension in a tar"),
        _field("hand", pa.int32(), "tar: position in the picture's list of hands; npz: row number"),
        _field("ordinal", pa.int64(), "position among all hands of the source, unusable ones included"),
        _field("image_name", pa.string(), "the tar member, or the npz's imgname"),
        _field("image_path", pa.string(), "npz: the picture's file, as `source`", nullable=True),
        _field("image_offset", pa.int64(), "where the picture's bytes start in `source`; -1: they are a file"),
        _field("image_length", pa.int64(), "bytes"),
        _field("image_sha256", pa.string(), "of the encoded picture; empty where there is none"),
        _field("width", pa.int32(), "of the picture, px"),
        _field("height", pa.int32(), "of the picture, px"),
        _field("center", pa.list_(pa.float64(), 2), "of the hand's box, photo px"),
        _field("scale", pa.list_(pa.float64(), 2), "width and height of the box, px / 200 (npz too)"),
        _field("right", pa.float32(), "1 right, 0 left"),
        _field("keypoints_2d", pa.list_(pa.float32(), 63), "(21, 3) x, y in photo px, confidence; OpenPose order"),
        _field("keypoints_3d", pa.list_(pa.float32(), 84), "(21, 4) X, Y, Z in metres, camera frame, confidence"),
        _field("hand_pose", pa.list_(pa.float32(), 48), "(16, 3) axis-angle, global orientation first, absolute"),
        _field("betas", pa.list_(pa.float32(), 10), "MANO shape"),
        _field("has_hand_pose", pa.float32(), "1 where hand_pose is a label"),
        _field("has_betas", pa.float32(), "1 where betas is a label"),
        _field("protocol", pa.string(), "freihand | ho3d | hint | empty: rules of evaluation"),
        _field("truth_xyz", pa.list_(pa.float32()), "(21, 3) m, the protocol's joint order and axes", nullable=True),
        _field("truth_vertices", pa.list_(pa.float32()), "(V, 3) m, the protocol's axes", nullable=True),
        _field("labels_sha256", pa.string(), "of everything from `center` to `truth_vertices`"),
        _field("reason", pa.string(), "null: usable. Else a word, a colon and detail", nullable=True),
    ]
)
"""Where a row has a reason, its labels may be zeros."""

LABEL_COLUMNS = SCHEMA.names[SCHEMA.get_field_index("center") : SCHEMA.get_field_index("labels_sha256")]
PLAN_COLUMNS = ["sample_id", "dataset", "source", "ordinal", "image_sha256", "labels_sha256", "reason"]
"""All that `shards_of` and a snapshot need: a fifth of the bytes of a whole manifest."""

_LINE_COLUMNS = ["image_sha256", "labels_sha256", "sample_id"]
"""What an input hash covers of a row, in this order."""
_BLOCK_ROWS = 1 << 16
"""Rows whose lines are in memory at once, 12 MB: all of the largest data set's would be 250."""


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """One shard to be: which rows of the table it was planned from, and the digest of what they hold."""

    dataset: str
    role: Role
    input_hash: str
    """sha256 over the role and, in order, each row's sample id and the digests of its picture and labels."""
    rows: npt.NDArray[np.int64]
    """Indices into the table, ascending; rows with a reason are not among them."""

    @property
    def n_samples(self) -> int:
        return len(self.rows)


def manifest_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows in SCHEMA's columns, any but `labels_sha256` of them; that is computed here."""
    hashed = [{**row, "labels_sha256": labels_sha256(row)} for row in rows]
    return pa.Table.from_pylist(hashed, schema=SCHEMA)


def labels_sha256(row: dict[str, Any]) -> str:
    """The one digest of a row's labels: names, sizes and little-endian bytes of every label column, in order."""
    digest = hashlib.sha256()
    for name in LABEL_COLUMNS:
        value = row[name]
        if isinstance(value, str):
            content = value.encode()
        else:
            kind = "<f8" if name in ("center", "scale") else "<f4"
            content = b"" if value is None else np.asarray(value, kind).tobytes()
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def manifest_name(table: pa.Table) -> str:
    """The file name that follows from a manifest's content."""
    digest = hashlib.sha256(repr(SCHEMA.names).encode())
    for name in SCHEMA.names:
        if name not in LABEL_COLUMNS:  # labels_sha256 stands for those
            digest.update("\n".join(map(str, table.column(name).to_pylist())).encode())
    return f"{digest.hexdigest()[:32]}.parquet"


def write_manifest(path: Path, table: pa.Table) -> None:
    """Write whole or not at all. The same table gives the same bytes (with the same pyarrow)."""
    buffer = io.BytesIO()
    pq.write_table(table.cast(SCHEMA), buffer, compression="zstd", row_group_size=1 << 16)
    write_bytes_atomic(path, buffer.getvalue())


def read_manifest(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A manifest, or some of its columns. Raises DamageError for a file that is none."""
    try:
        table = pq.read_table(path, columns=None if columns is None else list(columns), partitioning=None)
    except _UNREADABLE as error:
        raise _not_readable(path, error) from error
    return _whole(table, SCHEMA.names if columns is None else columns, path)


def read_plan_columns(path: Path) -> pa.Table:
    """PLAN_COLUMNS of a manifest, those that repeat one value as dictionaries.

    `read_manifest` gives the same values in twice the time: it opens a data set, and the real job has 2,165 manifests.
    Raises DamageError for a file that is none.
    """
    try:
        with pq.ParquetFile(path, read_dictionary=["dataset", "source"]) as file:
            table = file.read(columns=PLAN_COLUMNS, use_threads=False)
    except _UNREADABLE as error:
        raise _not_readable(path, error) from error
    return _whole(table, PLAN_COLUMNS, path)


_UNREADABLE = (OSError, pa.ArrowException, ValueError, KeyError)
"""What pyarrow raises over damaged bytes; a name of a column that is no UTF-8 is a ValueError."""


def _whole(table: pa.Table, columns: Sequence[str], path: Path) -> pa.Table:
    """The table, once it has these columns with their types (a repeated value's as a dictionary or not)."""
    for name in columns:
        if name not in table.schema.names:
            raise _not_readable(path, f"it has no column {name}")
        found = table.schema.field(name).type
        if (found.value_type if pa.types.is_dictionary(found) else found) != SCHEMA.field(name).type:
            raise _not_readable(path, f"its column {name} is {found}, not {SCHEMA.field(name).type}")
    return table


def _not_readable(path: Path, error: Exception | str) -> DamageError:
    return DamageError(f"{path}: not a readable manifest ({error}). Delete it; `handstill run` writes it again.")


def shards_of(table: pa.Table, role: Role, samples_per_shard: int) -> list[ShardPlan]:
    """Cut a data set's rows (of one or more sources, each in one piece) into shards of at most `samples_per_shard`.

    A shard is a range of ordinals of one source, whether or not all of them are usable: what becomes of one hand
    touches its own shard only. Shards without a usable hand are left out. Needs PLAN_COLUMNS.
    """
    usable = np.flatnonzero(pc.is_null(table.column("reason")).to_numpy())
    if not len(usable):
        return []
    bounds = np.append(_starts_of_shards(table, usable, samples_per_shard), len(usable))
    dataset = str(table.column("dataset")[0].as_py())
    prefix = f"{role}\n".encode()
    table = table.select(_LINE_COLUMNS)
    plans = []
    for some in _blocks(bounds):
        rows = usable[some[0] : some[-1]]
        for first, last, content in _slices(_lines(_rows_of(table, rows)), some - some[0]):
            digest = hashlib.sha256(prefix)
            digest.update(content)
            plans.append(ShardPlan(dataset, role, digest.hexdigest(), rows[first:last]))
    return plans


def _blocks(bounds: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """The bounds in pieces that share their ends, about `_BLOCK_ROWS` rows each."""
    first = 0
    while first < len(bounds) - 1:
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + _BLOCK_ROWS)))
        yield bounds[first : last + 1]
        first = min(last, len(bounds) - 1)


def _rows_of(table: pa.Table, rows: npt.NDArray[np.int64]) -> pa.Table:
    """Some rows, ascending; without a copy where none between them is left out."""
    piece = table.slice(rows[0], rows[-1] - rows[0] + 1)
    return piece if len(piece) == len(rows) else piece.take(rows - rows[0])


def _starts_of_shards(table: pa.Table, usable: npt.NDArray[np.int64], samples_per_shard: int) -> npt.NDArray[np.int64]:
    """Positions among the usable rows."""
    sources = _one_array(table.column("source").dictionary_encode().unify_dictionaries()).indices.to_numpy()[usable]
    chunks = table.column("ordinal").to_numpy()[usable] // samples_per_shard
    new = np.flatnonzero((np.diff(sources) != 0) | (np.diff(chunks) != 0)) + 1
    return np.concatenate([[0], new])


def _lines(table: pa.Table) -> pa.Array:
    """One line a row. Digests come first and names hold no line ends, so no two lists of rows give the same lines."""
    parts = [table.column(name).cast(pa.large_string()) for name in _LINE_COLUMNS]
    return _one_array(pc.binary_join_element_wise(*parts, *(pa.scalar(end, pa.large_string()) for end in ("\n", " "))))


def _slices(lines: pa.Array, bounds: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, memoryview]]:
    """(first row, row behind the last, their lines' bytes) between neighbouring bounds."""
    _, offsets_buffer, data = lines.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[lines.offset :]
    content = memoryview(data)
    for first, last in itertools.pairwise(bounds):
        yield int(first), int(last), content[offsets[first] : offsets[last]]


def _one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)
