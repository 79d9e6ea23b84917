"""`handstill show`: what an output holds, for a person who has only its path or the name of the stage that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from pipeline.experiment import Experiment, open_experiment
from pipeline.tables import bytes_below, human_bytes, table
from storage.cache import CacheFolder
from storage.errors import DamageError, InputError
from storage.snapshots import read_head, read_info, snapshot_path
from trainer.export_files import EXPORT

if TYPE_CHECKING:
    from models.weight_loading import KeyReport


_SAMPLES_NAMED = 3
"""Of a table, so that `show` can be given one."""


def is_sample_id(what: str) -> bool:
    """Whether a sample is meant (`<data set>:<key>#<hand>`), and not a file of such a name."""
    return ":" in what and "#" in what and not Path(what).exists()


def show(config: Path, what: str) -> dict[str, Any]:
    """What stands at a path, or in the places that a stage writes to.

    Raises:
        InputError: there is no such stage, or nothing that we wrote at that path.
    """
    path = Path(what)
    if path.exists():
        return _show_path(path)
    places = {
        "ingest": lambda experiment: experiment.workdir.manifests,
        "teach": lambda experiment: experiment.caches_folder,
        "train": lambda experiment: experiment.workdir.students,
        "evaluate": lambda experiment: experiment.workdir.evaluations,
        "compare": lambda experiment: experiment.workdir.report,
    }
    if what == "synthesise":
        return _show_synthesised(open_experiment(config))
    if what not in places:
        raise InputError(
            f"show: found {what!r}; want a path that exists, a sample's id, or one of synthesise, {', '.join(places)}"
        )
    experiment: Experiment = open_experiment(config)
    folder = places[what](experiment)
    if not folder.is_dir():
        raise InputError(f"show {what}: nothing is there yet; run `handstill run {what}`")
    outputs = [_brief(item) | _named(what, item.relative_to(folder)) for item in _outputs(what, folder)]
    return {"kind": "stage", "stage": what, "path": str(folder), "outputs": outputs}


def _show_synthesised(experiment: Experiment) -> dict[str, Any]:
    """The files of rendered hands that are whole, and how many hands are in each."""
    from stages.synthesise import synthesise_units, unit_done

    section = experiment.config.synthesise
    if section is None:
        raise InputError("show synthesise: the configuration has no section `synthesise`; its data sets are somebody's")
    units = synthesise_units(section, experiment.datasets, experiment.base)
    outputs = [
        {"path": str(unit.path), "bytes": unit.path.stat().st_size, "dataset": unit.dataset, "hands": unit.hands}
        for unit in units
        if unit_done(unit)
    ]
    if not outputs:
        raise InputError("show synthesise: nothing is there yet; run `handstill run synthesise`")
    return {"kind": "stage", "stage": "synthesise", "path": str(experiment.base), "outputs": outputs}


def _named(stage: str, path: Path) -> dict[str, Any]:
    """What an output is of, by where it stands in its stage's folder."""
    if stage == "ingest":
        return {"dataset": path.parts[0]}
    if stage == "train":
        return {"student": path.parts[0], "seed": int(path.parts[1].removeprefix("seed-"))}
    return {"network": path.parts[0]} if stage == "evaluate" else {}


def _outputs(stage: str, folder: Path) -> list[Path]:
    patterns = {"ingest": "*/*.parquet", "teach": "*/cache.json", "train": "*/*/*/result.json"}
    found = sorted(folder.glob(patterns.get(stage, "*")))
    return [path.parent if path.suffix == ".json" and stage in ("teach", "train") else path for path in found]


def _brief(path: Path) -> dict[str, Any]:
    if (path / "cache.json").is_file() or path.suffix == ".parquet":
        return _show_path(path)
    return {"path": str(path), "bytes": bytes_below(path)}


def _show_path(path: Path) -> dict[str, Any]:
    try:
        return _show_output(path)
    except InputError:
        raise
    except (ValueError, KeyError, OSError, RecursionError) as error:  # pyarrow's and zarr's errors are among them
        raise DamageError(f"show: {path} cannot be read: {type(error).__name__}: {error}") from error


def _show_output(path: Path) -> dict[str, Any]:
    if (path / "zarr.json").is_file():
        return _show_zarr(path)
    if (path / "cache.json").is_file():
        return _show_cache(path)
    if path.suffix == ".parquet":
        return _show_parquet(path)
    if path.suffix in (".ckpt", ".pth"):
        return _show_checkpoint(path)
    if path.suffix == ".json":
        return {"kind": "json", "path": str(path), "content": json.loads(path.read_text(encoding="utf-8"))}
    if (path / EXPORT).is_file():
        return {"kind": "export", "path": str(path), "content": json.loads((path / EXPORT).read_text(encoding="utf-8"))}
    if (path / "result.json").is_file():
        content = json.loads((path / "result.json").read_text(encoding="utf-8"))
        return {"kind": "student", "path": str(path), "content": content}
    raise InputError(
        f"show: {path} is none of a shard (.zarr), a cache folder, a table (.parquet), a student's folder, "
        "an export's folder, a checkpoint (.ckpt)"
    )


def _show_zarr(path: Path) -> dict[str, Any]:
    import zarr

    node = zarr.open(store=path, mode="r")
    if isinstance(node, zarr.Array):
        return {"kind": "array", "path": str(path), "arrays": [_array("", node)]}
    arrays = [_array(name, member) for name, member in node.members(max_depth=None) if isinstance(member, zarr.Array)]
    return {
        "kind": "shard",
        "path": str(path),
        "attributes": dict(node.attrs),
        "arrays": sorted(arrays, key=lambda item: str(item["name"])),
    }


def _array(name: str, array: Any) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "dimensions": list(array.metadata.dimension_names or []),
        **{key: value for key, value in array.attrs.items() if isinstance(value, str)},
    }


def _show_cache(path: Path) -> dict[str, Any]:
    folder = CacheFolder(path)
    records = folder.finished()
    snapshots = {
        name: {"digest": digest, "cached": info.cached, "quarantined": info.quarantined}
        for name, digest in read_head(path).items()
        for info in [read_info(snapshot_path(path, digest))]
    }
    return {
        "kind": "cache",
        "path": str(path),
        "role": folder.identity.get("role"),
        "encoding": _encoding(folder),
        "identity": folder.identity,
        "shards": len(records),
        "rows": sum(record.rows for record in records.values()),
        "bytes": sum(record.bytes for record in records.values()),
        "snapshots": snapshots,
    }


def _show_checkpoint(path: Path) -> dict[str, Any]:
    """What loading it would use, ignore and why, miss, and not expect; and the network that it is."""
    from models.fast_hamer import describe_checkpoint

    found = describe_checkpoint(path)
    ignored: dict[str, int] = {}
    for why in found.report.ignored.values():
        ignored[why] = ignored.get(why, 0) + 1
    return {
        "kind": "checkpoint",
        "path": str(path),
        "network": found.network,
        "parameters": found.parameters,
        "model_config": str(found.model_config),
        "hand_model": "inside" if _holds_a_hand(found.report) else "none: name one in teacher.mano_model",
        "used": len(found.report.used),
        "ignored": ignored,
        "missing": list(found.report.missing),
        "unexpected": list(found.report.unexpected),
    }


def _holds_a_hand(report: KeyReport) -> bool:
    return any(name.startswith("mano.") for name in (*report.used, *report.ignored))


def _encoding(folder: CacheFolder) -> str:
    """How the cache's features are stored, and how near to the teacher's they come back where that was measured."""
    name, codec = folder.identity["features"]["encoding"], folder.codec()
    return f"{name}, relative error {codec.error:.4f} at calibration" if codec.error else str(name)


def _show_parquet(path: Path) -> dict[str, Any]:
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    reasons = pq.read_table(path, columns=["reason"]).column("reason") if "reason" in names else None
    batches = file.iter_batches(_SAMPLES_NAMED, columns=["sample_id"]) if "sample_id" in names else None
    return {
        "kind": "table",
        "path": str(path),
        "rows": file.metadata.num_rows,
        "quarantined": None if reasons is None else len(reasons) - reasons.null_count,
        **({} if batches is None else {"first_samples": [i for b in islice(batches, 1) for i in b[0].to_pylist()]}),
        "columns": {field.name: str(field.type) for field in file.schema_arrow},
    }


def show_text(document: Mapping[str, Any]) -> str:
    """The same for a person."""
    lines = [f"{document.get('stage', document['kind'])}: {document['path']}"]
    for key, value in document.items():
        if key in ("kind", "path", "stage"):
            continue
        if key == "arrays":
            rows = [
                [a["name"], "x".join(map(str, a["shape"])), a["dtype"], " ".join(a["dimensions"]), a.get("unit", "")]
                for a in value
            ]
            lines.append(table(["array", "shape", "dtype", "dimensions", "unit"], rows))
        elif key == "outputs":
            lines += [_brief_line(item) for item in value]
        elif key == "bytes":
            lines.append(f"bytes: {human_bytes(value)}")
        else:
            lines.append(f"{key}: {json.dumps(value, indent=2) if isinstance(value, dict) else value}")
    return "\n".join(lines)


def _brief_line(item: Mapping[str, Any]) -> str:
    of = [f"{key} {item[key]}" for key in ("dataset", "student", "seed", "network", "role") if key in item]
    of += [", ".join(item["snapshots"])] if item.get("snapshots") else []
    facts = of + [
        f"{item[key]} {key}" for key in ("rows", "hands", "quarantined", "shards") if item.get(key) is not None
    ]
    facts += [human_bytes(item["bytes"])] if "bytes" in item else []
    return f"  {item['path']}: " + ", ".join(facts)
