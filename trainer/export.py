"""A trained student as a folder that runs without PyTorch: ONNX, preprocessing as data, a numpy runtime, a model card.

The folder (README.md in it says the same to its reader):

    model.onnx | model.int8.onnx    the network, any batch size
    preprocessing.json              what goes in and what comes out, as data
    handstill_numpy.py              crops, hand layer and camera with numpy, Pillow and onnxruntime only
    weights.safetensors, student.json   the same weights for PyTorch (`models.student.Student`)
    hand_model.npz                  only where the hand model is in the graph too; else it stands beside the folder
    export.json                     what went in, the check against PyTorch, the digests of all files
    README.md                       the model card

Nothing is published unless ONNX Runtime gave PyTorch's joints. The same student and versions give the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.hand_model import hand_model_digest
from models.onnx_graph import hand_model_npz, write_onnx
from models.preprocessing import normalise
from models.sizes import HAMER, IMAGE_SIZE
from models.student import Student
from storage.durable import (
    canonical_json,
    partial_path,
    publish_directory,
    remove_tree,
    sha256_file,
    write_bytes_atomic,
)
from storage.errors import InputError, WorkError
from trainer.evaluate import EvaluationSet
from trainer.export_files import (
    DESCRIPTION,
    EXPORT,
    HAND_MODEL,
    RUNTIME,
    describe_network,
    hand_model_licence,
    model_card,
)

log = logging.getLogger("handstill")

EXPORT_VERSION = 4
"""Raised when an export's bytes change for another reason than its student's; part of its name."""
NETWORK, NETWORK_INT8 = "model.onnx", "model.int8.onnx"
HAND_MODEL_OF_PYTORCH = "hand_model.safetensors"

TOLERANCE_MM = 0.01
"""Of joints and vertices, ONNX Runtime against PyTorch; rounding alone leaves some 0.0002."""
TOLERANCE_PX = 0.1
"""Of the joints in the 256-pixel crop: about as much, at the distance of a hand that fills the crop."""


@dataclass(frozen=True)
class Int8:
    """What static quantisation looks at."""

    calibrate_on: tuple[EvaluationSet, ...]
    measure_on: tuple[EvaluationSet, ...]
    pictures: int = 256
    """At most so many of each."""


@dataclass(frozen=True)
class ExportJob:
    """One export; by value."""

    student: Path
    out_dir: Path
    provenance: Mapping[str, Any]
    """For the model card and export.json: see `trainer.export_files.model_card`."""
    with_hand_model: bool = False
    int8: Int8 | None = None
    check_on: EvaluationSet | None = None
    """Pictures for the check; None: procedural ones."""


@dataclass(frozen=True)
class Difference:
    """The largest difference of ONNX Runtime from PyTorch over some pictures."""

    joints_mm: float
    vertices_mm: float
    keypoints_2d_px: float
    pictures: int
    batch_sizes: tuple[int, ...]

    @property
    def small(self) -> bool:
        """Whether it is rounding. NaN is not."""
        return max(self.joints_mm, self.vertices_mm) <= TOLERANCE_MM and self.keypoints_2d_px <= TOLERANCE_PX


@dataclass(frozen=True)
class ExportResult:
    """Where everything is, and how near it is to the PyTorch student."""

    folder: Path
    network: str
    hand_model: Path
    bytes: int
    """Of the network's file or files."""
    difference: Difference
    """Of the float graph."""
    int8: dict[str, float] = field(default_factory=dict)
    """What int8 costs, in mm: see `trainer.quantise.loss_mm`."""


def export_student(job: ExportJob) -> ExportResult:
    """Write the export, check it, publish it.

    Raises:
        InputError: no student there, the extra `export` is not installed, or the folder is taken.
        WorkError: the network has no graph, or ONNX Runtime does not give PyTorch's joints; nothing is published.
    """
    if job.out_dir.exists():
        raise InputError(f"{job.out_dir}: is there already. Name another folder, or delete it.")
    student = Student.load(job.student)
    job.out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(job.out_dir)
    partial.mkdir()
    try:
        result = _fill(partial, job, student)
        if not job.with_hand_model:
            write_bytes_atomic(result.hand_model, hand_model_npz(student.hand_model))
        if not publish_directory(partial, job.out_dir):
            raise InputError(f"{job.out_dir}: another export was faster. Name another folder, or delete it.")
    except BaseException:
        if partial.is_dir():
            remove_tree(partial)
        raise
    return result


def _fill(folder: Path, job: ExportJob, student: Student) -> ExportResult:
    """All files of the export."""
    network = NETWORK if job.int8 is None else NETWORK_INT8
    log.info("export: writing the graph")
    write_onnx(student.backbone, student.mano_head, student.mano if job.with_hand_model else None, folder / NETWORK)
    (folder / HAND_MODEL).write_bytes(hand_model_npz(student.hand_model))
    (folder / RUNTIME).write_bytes((Path(__file__).parents[1] / "models" / RUNTIME).read_bytes())
    student.save(folder)
    describe = describe_network(with_hand_model=job.with_hand_model, inner_columns=student.spec.backbone == HAMER)
    _write_json(folder / DESCRIPTION, {"network": NETWORK, **describe})
    log.info("export: comparing ONNX Runtime with PyTorch")
    difference = compare(folder, student, _pictures(job))
    if not difference.small:
        raise WorkError(_unlike(difference))
    losses: dict[str, float] = {}
    if job.int8 is not None:
        losses = _quantised(folder, job.int8, student)
        _write_json(folder / DESCRIPTION, {"network": network, **describe})
    if not job.with_hand_model:
        (folder / HAND_MODEL).unlink()
        (folder / HAND_MODEL_OF_PYTORCH).unlink()
    beside = job.out_dir.with_name(f"{job.out_dir.name}.{HAND_MODEL}")
    result = ExportResult(
        folder=job.out_dir,
        network=network,
        hand_model=job.out_dir / HAND_MODEL if job.with_hand_model else beside,
        bytes=sum(path.stat().st_size for path in folder.glob(f"{network}*")),
        difference=difference,
        int8=losses,
    )
    _write_words(folder, job, student, result)
    return result


def _quantised(folder: Path, int8: Int8, student: Student) -> dict[str, float]:
    """Put the int8 network in the float one's place; what that costs."""
    from trainer.quantise import loss_mm, quantise

    if (folder / f"{NETWORK}.data").exists():
        raise InputError("--int8: networks whose weights are above 1.5 GB are not quantised. Export it as float.")
    log.info("export: calibrating and quantising")
    quantise(folder / NETWORK, folder / NETWORK_INT8, int8)
    for path in folder.glob(f"{NETWORK}*"):
        path.unlink()
    return loss_mm(folder, NETWORK_INT8, student, int8)


def _write_words(folder: Path, job: ExportJob, student: Student, result: ExportResult) -> None:
    """The model card, and export.json last: it has the digests of all others."""
    digest = hand_model_digest(student.hand_model)
    facts = {
        "export_version": EXPORT_VERSION,
        "backbone": student.spec.backbone,
        "parameters": sum(p.numel() for p in student.parameters()),
        "hand_model": {"sha256": digest, "licence": hand_model_licence(digest), "inside": job.with_hand_model},
        "network": {"file": result.network, "bytes": result.bytes},
        "difference_from_pytorch": asdict(result.difference),
        "int8": result.int8 or None,
        "made_with": {name: version(name) for name in ("torch", "timm", "onnx", "onnxscript", "onnxruntime")},
        "provenance": dict(job.provenance),
    }
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    _write_json(folder / EXPORT, facts | {"files": files})


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_bytes(canonical_json(document))


# ---- the check ------------------------------------------------------------------------------------------------------


def compare(export: Path, student: Student, pictures: NDArray[np.uint8]) -> Difference:
    """How far the export's answers, through its own runtime, are from the student's.

    `pictures`: (N,256,256,3), N at least 4; in batches of one, two and the rest, so that a batch size that was frozen
    into the graph is found.
    """
    from models.handstill_numpy import Hands  # the module that travels with the export

    hands = Hands(export)
    worst = {"keypoints_3d": 0.0, "vertices": 0.0, "keypoints_2d": 0.0}
    parts = np.split(pictures, [1, 3])
    for part in parts:
        found = hands(part)
        with torch.inference_mode():
            wanted = student(normalise(torch.from_numpy(part)))
        for name, so_far in worst.items():
            distance = np.linalg.norm(found[name] - wanted[name].numpy(), axis=-1)
            worst[name] = float(np.maximum(so_far, distance.max()))  # NaN stays
    return Difference(
        joints_mm=worst["keypoints_3d"] * 1000,
        vertices_mm=worst["vertices"] * 1000,
        keypoints_2d_px=worst["keypoints_2d"] * IMAGE_SIZE,
        pictures=len(pictures),
        batch_sizes=tuple(len(part) for part in parts),
    )


def _unlike(difference: Difference) -> str:
    return (
        f"ONNX Runtime does not give PyTorch's hands: joints differ by {difference.joints_mm:.4g} mm and vertices by "
        f"{difference.vertices_mm:.4g} mm, {TOLERANCE_MM} is allowed; in the crop by {difference.keypoints_2d_px:.4g} "
        f"px, {TOLERANCE_PX} is allowed. Nothing was published."
    )


def _pictures(job: ExportJob) -> NDArray[np.uint8]:
    """(N,256,256,3) to compare on."""
    if job.check_on is not None:
        from storage.cache import open_cache
        from trainer.data import PICTURES

        reader = open_cache(job.check_on.cache_root, {job.check_on.dataset: job.check_on.digest})
        if len(reader) >= 4:
            rows = np.linspace(0, len(reader) - 1, min(len(reader), 16)).astype(int)
            return np.asarray(reader.read(rows, [0] * len(rows), [PICTURES])[PICTURES])
    return procedural_pictures(8)


def procedural_pictures(count: int) -> NDArray[np.uint8]:
    """Smooth coloured noise, (count,256,256,3), the same every time."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
