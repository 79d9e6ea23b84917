"""`handstill show SAMPLE_ID`: one cached hand, view by view, beside what its source and parameters give today."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.caches import CacheState, stored_state
from pipeline.experiment import Experiment
from pipeline.replaying import Outcome, replay
from pipeline.tables import table
from pipeline.teaching import ROLES
from stages.replay import Comparison, View, stored_view
from storage.durable import write_bytes_atomic
from storage.encodings import decode_picture
from storage.errors import InputError
from storage.reading import open_cache
from storage.snapshots import read_head, read_snapshot, snapshot_path
from trainer.pictures import sheet

SHOWN_PX = 384
"""Side of a shown picture: half as large again as it is, so that joints can be told apart."""


@dataclass(frozen=True, eq=False)
class Tile:
    """What is drawn of one view."""

    stored: View
    made: View | None
    """None: it could not be made again."""
    said: NDArray[np.float32]
    """(21, 2) the teacher's joints, crop units."""


def show_sample(
    experiment: Experiment, sample_id: str, *, view: int | None = None, picture: Path | None = None
) -> dict[str, Any]:
    """What is cached of a sample, and how its views come out when they are made again.

    view: only this one. picture: a PNG to write: a row for each view, stored and made again side by side, the labels
    in green, what the teacher said in red.

    Raises:
        InputError: no current snapshot has the sample, or it has no such view, or the PNG cannot be written.
    """
    places = [
        (state, row)
        for role in ROLES
        if (state := stored_state(experiment, role)).root.is_dir()
        for row in _snapshot_rows(state, sample_id)
    ]
    if not places:
        raise InputError(
            f"show: {sample_id} is in no current snapshot of this configuration; want <data set>:<key>#<hand> "
            "(`handstill show` of a table, e.g. `handstill show CACHE/snapshots/*.parquet`, names some of those in it; "
            "`handstill show teach` says where the caches are)"
        )
    found = [_in_one_cache(experiment, state, row, view) for state, row in places]
    tiles = [tile for _, shown in found for tile in shown]
    if picture is not None and tiles:
        _write(picture, tiles)
    written = str(picture) if picture is not None and tiles else None
    return {"kind": "sample", "sample_id": sample_id, "caches": [document for document, _ in found], "picture": written}


def _snapshot_rows(state: CacheState, sample_id: str) -> list[dict[str, Any]]:
    tables = [read_snapshot(snapshot_path(state.root, digest)) for digest in read_head(state.root).values()]
    return [row for found in tables for row in found.filter(pc.equal(found["sample_id"], sample_id)).to_pylist()]


def _in_one_cache(
    experiment: Experiment, state: CacheState, row: Mapping[str, Any], view: int | None
) -> tuple[dict[str, Any], list[Tile]]:
    names = ("dataset", "source", "image_sha256", "labels_sha256", "shard", "row", "reason")
    facts = {"role": state.role, "cache": str(state.address), **{name: row[name] for name in names}}
    if row["row"] is None:
        return facts | {"made_again": None, "views": []}, []
    reader = open_cache(state.address)
    position = reader.position(str(row["sample_id"]))
    views = range(reader.n_views) if view is None else [view]
    if views[0] not in range(reader.n_views):
        raise InputError(f"--view: found {view}, want one of 0 to {reader.n_views - 1} ({state.role})")
    *_, outcome = replay(experiment, state, reader, [position])  # manifests that cannot be read come first
    remade = {made.view: (made, comparison) for _, made, comparison in outcome.views}
    shown, tiles = [], []
    for number in views:
        stored = stored_view(reader, position, number)
        made, comparison = remade.get(number, (None, None))
        said = reader.read([position], [number], ["teacher/keypoints_2d"])["teacher/keypoints_2d"][0]
        tiles.append(Tile(stored, made, said))
        shown.append(_described(stored, comparison))
    return facts | {"made_again": _why_not(outcome), "views": shown}, tiles


def _why_not(outcome: Outcome) -> str:
    """In a word or two, whether the views could be made again."""
    if outcome.views:
        return "yes"
    return "no: its source has changed" if outcome.changed else "no: its source is not there"


def _described(stored: View, comparison: Comparison | None) -> dict[str, Any]:
    parameters = {
        name.removeprefix("views/"): value.tolist()
        for name, value in stored.values.items()
        if name.startswith("views/")
    }
    remade = None
    if comparison is not None:
        remade = {
            "identical_picture": comparison.identical_picture,
            "max_pixel_difference": comparison.max_pixel_difference,
            "max_label_difference": comparison.max_label_difference,
            "differences": list(comparison.differences),
        }
    return {"view": stored.view, **parameters, "picture_bytes": len(stored.encoded), "remade": remade}


def _write(path: Path, tiles: Sequence[Tile]) -> None:
    """Two pictures a view; where it could not be made again the second is black."""
    pictures, true, pred, captions = [], [], [], []
    for tile in tiles:
        for one, what in ((tile.stored, "stored"), (tile.made, "made again" if tile.made else "cannot be made again")):
            pictures.append(np.zeros((256, 256, 3), np.uint8) if one is None else decode_picture(one.encoded))
            true.append((one or tile.stored).values["labels/keypoints_2d"])
            pred.append(tile.said)
            captions.append(f"view {tile.stored.view}, {what}; labels green, teacher red")
    data = sheet(np.stack(pictures), np.stack(true), np.stack(pred), 2, SHOWN_PX, captions)
    try:
        write_bytes_atomic(path, data)
    except OSError as error:
        raise InputError(
            f"--picture: cannot write {path} ({error.strerror}); give a file in a folder that is there"
        ) from None


def sample_text(document: Mapping[str, Any]) -> str:
    """The same for a person."""
    lines = [f"sample: {document['sample_id']}"]
    for cache in document["caches"]:
        lines.append(f"{cache['role']}: {cache['cache']}")
        if cache["reason"] is not None:
            lines.append(f"  left out: {cache['reason']}")
            continue
        lines.append(f"  shard {cache['shard']}, row {cache['row']}; source {cache['source']}")
        lines.append(f"  picture sha256 {cache['image_sha256']}, labels sha256 {cache['labels_sha256']}")
        rows = [_line(view, cache["made_again"]) for view in cache["views"]]
        lines.append(table(["view", "scale", "turned", "moved", "colour", "mirrored", "box", "made again"], rows))
    if document["picture"] is not None:
        lines.append(
            f"{document['picture']}: stored (left) and made again (right); labels green, the teacher's joints red"
        )
    return "\n".join(lines)


def _line(view: Mapping[str, Any], made_again: str) -> list[object]:
    remade = view["remade"]
    told = made_again
    if remade is not None:
        told = "; ".join(remade["differences"]) or (
            "the same to the bit"
            if remade["identical_picture"]
            else f"within {remade['max_pixel_difference']} levels (other library versions)"
        )
    x, y = view["translation"]
    return [
        view["view"],
        f"{view['scale']:.3f}",
        f"{view['rotation_deg']:.1f} deg",
        f"{x:+.3f} {y:+.3f}",
        " ".join(f"{factor:.2f}" for factor in view["colour"]),
        "yes" if view["flip"] else "no",
        f"{view['box_px']:.1f} px",
        told,
    ]
