"""Samples tables as Parquet, and the few samples of an evaluation that a person wants to look at.

`cases.parquet` holds, for the samples that a network answered best and worst: `sample_id`, `error` by the first of
PAIRED_METRICS that the table has, `picture` (the students' view as the cache has it, encoded) and `label_2d` (21,3),
crop units and confidence. So a comparison far from the caches can show them, and nothing else of a data set leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage.durable import partial_path, sync_directory
from storage.errors import DamageError
from storage.reading import CacheReader

PAIRED_METRICS = ("pa_mpjpe_mm", "pa_mpvpe_mm", "error_2d_share")
"""What is compared sample by sample: the first of these that the samples tables of a data set hold."""
BEST, WORST = 6, 18
"""So many of each are kept: the samples that are worst for several students must be among them."""

Columns = dict[str, NDArray[Any]]

_TYPES = {
    "sample_id": pa.string(),
    "picture": pa.binary(),
    **{
        name: pa.list_(pa.float16(), width)
        for name, width in (("joint_errors_mm", 21), ("keypoints_2d", 42), ("label_2d", 63))
    },
}
"""Of the columns that are not one float a sample."""
_MAX_NUMBERS = 1 << 28
"""In a table, as float64 2 GiB: three million samples."""
_MAX_PICTURES = 1000


def paired_metric(columns: Mapping[str, NDArray[Any]]) -> str | None:
    """The first of PAIRED_METRICS that some sample has."""
    return next((name for name in PAIRED_METRICS if name in columns and np.isfinite(columns[name]).any()), None)


def extreme_cases(reader: CacheReader, columns: Mapping[str, NDArray[Any]], view: int) -> dict[str, Any]:
    """The columns of `cases.parquet`, the best first. columns: the samples table, in the reader's order."""
    metric = paired_metric(columns)
    errors = np.full(len(reader), np.nan) if metric is None else columns[metric]
    order = np.argsort(errors, kind="stable")[: int(np.isfinite(errors).sum())]
    rows = order if len(order) <= BEST + WORST else np.concatenate([order[:BEST], order[-WORST:]])
    labels = reader.read(rows, [view] * len(rows), ["labels/keypoints_2d"]) if len(rows) else {}
    return {
        "sample_id": columns["sample_id"][rows],
        "error": errors[rows],
        "picture": [reader.picture_bytes(int(row), view) for row in rows],
        "label_2d": labels.get("labels/keypoints_2d", np.zeros((0, 21, 3))),
    }


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """Write columns as Parquet, whole or not at all. Arrays (N, ...) of more than one dimension become lists of
    float16: millimetres to a few micrometres, crop units to a sixteenth of a pixel."""
    partial = partial_path(path)
    pq.write_table(pa.table({name: _column(values) for name, values in columns.items()}), partial)
    partial.replace(path)
    sync_directory(path.parent)


def _column(values: Any) -> pa.Array:
    if not isinstance(values, np.ndarray) or values.ndim == 1:
        return pa.array(values, pa.binary() if isinstance(values, list) else None)
    flat = pa.array(values.astype(np.float16).reshape(-1), pa.float16())
    return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))


def read_table(path: Path) -> Columns:
    """What `write_table` wrote; lists as (N, K) float64, binary as objects.

    Raises DamageError for any other file: a table comes from an MLflow server, to which others may write.
    """
    try:
        with pq.ParquetFile(path) as file:
            _check_schema(file.schema_arrow, file.metadata.num_rows)
            table = file.read()
    except (OSError, pa.ArrowException, ValueError, KeyError, OverflowError) as error:
        raise DamageError(f"it cannot be read ({error})") from error
    if any(column.null_count for column in table.columns):
        raise DamageError("it has holes")
    columns = {name: _array(table[name].combine_chunks()) for name in table.column_names}
    if len(set(columns["sample_id"].tolist())) != table.num_rows:
        raise DamageError("it has a sample twice")
    return columns


def _check_schema(schema: pa.Schema, rows: int) -> None:
    """Raises DamageError for no table of ours, before any of it is decoded: a few bytes may stand for many rows."""
    if len(set(schema.names)) != len(schema.names) or schema.get_field_index("sample_id") < 0:
        columns = ", ".join(schema.names[:20])
        raise DamageError(f"it has the columns {columns}, of which sample_id must be one, and none twice")
    width = 0
    for field in schema:
        wanted = _TYPES.get(field.name, pa.float64())
        if field.type != wanted and not (wanted == pa.float64() and pa.types.is_floating(field.type)):
            raise DamageError(f"its column {field.name} holds {field.type}, wanted {wanted}")
        width += getattr(field.type, "list_size", 1)
    most = _MAX_PICTURES if "picture" in schema.names else _MAX_NUMBERS // width
    if rows > most:
        raise DamageError(f"it has {rows} rows, at most {most} are read")


def _array(column: Any) -> NDArray[Any]:
    if not pa.types.is_fixed_size_list(column.type):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.float64).reshape(len(column), -1)
