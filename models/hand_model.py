"""The numbers of a hand model in MANO's layout, and the files they come from. Numpy only.

V vertices, F faces, 16 joints in MANO's kinematic order: 0 wrist; 1-3 index; 4-6 middle; 7-9 pinky; 10-12 ring;
13-15 thumb. Metres; a right hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from storage.durable import write_bytes_atomic
from storage.errors import InputError
from storage.unpickling import NUMPY_GLOBALS, PLAIN_GLOBALS, Inert, inert_class, load_restricted

Float = NDArray[np.float32]
Int = NDArray[np.int64]

OPEN_HAND = "open-hand"
OPEN_HAND_FILE = Path(__file__).parent / "assets" / "open_hand.npz"

JOINTS = 16
SHAPE_COMPONENTS = 10
FINGERTIP_VERTICES = (744, 320, 443, 554, 671)
"""Thumb, index, middle, ring, pinky; smplx's `vertex_ids['mano']`, which HaMeR uses (FreiHAND has 555 and 672)."""


@dataclass(frozen=True)
class HandModel:
    """A hand that shape and pose numbers deform; what MANO_RIGHT.pkl holds, as float32.

    Built through `hand_model_from_arrays`, which checks every shape and range.
    """

    v_template: Float
    """(V, 3) the mean hand at rest, metres."""
    shapedirs: Float
    """(V, 3, 10) what one unit of each shape component adds, metres."""
    posedirs: Float
    """(V, 3, 135) what each entry of the joints' R - I adds, metres."""
    j_regressor: Float
    """(16, V) the joints as weighted means of the vertices."""
    parents: Int
    """(16,) the joint each joint hangs from; -1 for the wrist."""
    weights: Float
    """(V, 16) how much each joint moves each vertex; rows sum to 1."""
    faces: Int
    """(F, 3)"""
    hands_mean: Float
    """(45,) the mean pose as axis-angle, radians. The network's rotations are absolute and never add it."""
    hands_components: Float
    """(C, 45) principal components of the pose. Nothing here computes with them: a checkpoint carries six only."""

    @property
    def n_vertices(self) -> int:
        return len(self.v_template)


def load_hand_model(source: str | Path) -> HandModel:
    """The hand model of a file: MANO_RIGHT.pkl (chumpy and scipy need not be installed), .npz, .safetensors, or the
    word `open-hand` for the built-in open model.

    Raises InputError for a file that is missing, unsafe, or no right hand in MANO's layout.
    """
    path = OPEN_HAND_FILE if str(source) == OPEN_HAND else Path(source)
    if "MANO_LEFT" in path.name:
        raise InputError(f"{path}: a left hand. Left hands are mirrored into right ones here: name MANO_RIGHT.pkl.")
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {found}. Wanted a hand model: MANO_RIGHT.pkl, or the word {OPEN_HAND}.")
    readers = {".pkl": _read_pickle, ".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise InputError(f"{path}: a hand model of type {path.suffix!r}, wanted one of {', '.join(readers)}.")
    return hand_model_from_arrays(readers[path.suffix](path), what=str(path))


def save_hand_model(hand_model: HandModel, path: Path) -> None:
    """Write a `.safetensors` file that `load_hand_model` reads; equal models give equal bytes."""
    write_bytes_atomic(path, hand_model_bytes(hand_model))


def hand_model_bytes(hand_model: HandModel) -> bytes:
    """What `save_hand_model` writes."""
    return bytes(save_safetensors(_arrays(hand_model)))


def hand_model_digest(hand_model: HandModel) -> str:
    """sha256 over all that decides an answer, so that one hand has one digest whatever file it came from.

    The pose components are left out: they decide nothing, and a checkpoint has only the first six.
    """
    digest = hashlib.sha256()
    for name, array in sorted(_arrays(hand_model).items()):
        if name != "hands_components":
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def hand_model_from_state_dict(tensors: Mapping[str, Any], what: str) -> HandModel:
    """The hand model inside a HaMeR checkpoint. `tensors`: its `mano.*` entries without that prefix, array-like."""
    names = {
        "v_template": "v_template",
        "shapedirs": "shapedirs",
        "posedirs": "posedirs",
        "J_regressor": "j_regressor",
        "parents": "parents",
        "lbs_weights": "weights",
        "faces_tensor": "faces",
        "hand_mean": "hands_mean",
        "hand_components": "hands_components",
    }
    absent = [name for name in names if name not in tensors]
    if absent:
        raise InputError(
            f"{what}: mano.{absent[0]} is missing ({len(absent)} of {len(names)}). Give teacher.mano_model."
        )
    arrays = {ours: np.asarray(tensors[theirs]) for theirs, ours in names.items()}
    posedirs = arrays["posedirs"]  # stored for a matrix product, (135, 3 V)
    if posedirs.ndim == 2:
        arrays["posedirs"] = np.ascontiguousarray(posedirs.T).reshape(-1, 3, posedirs.shape[0])
    return hand_model_from_arrays(arrays, what)


def hand_model_from_arrays(arrays: Mapping[str, Any], what: str) -> HandModel:
    """Check and convert arrays named as the fields of HandModel. Raises InputError that names `what` and the array."""
    names = [field.name for field in fields(HandModel)]
    absent = [name for name in names if name not in arrays]
    if absent:
        raise InputError(
            f"{what}: no hand model: {', '.join(absent)} missing; found {', '.join(sorted(arrays)) or '-'}."
        )
    made = {name: _array(arrays[name], "i" if name in ("parents", "faces") else "f", what, name) for name in names}
    vertices = made["v_template"].shape[0] if made["v_template"].ndim == 2 else 0
    if vertices <= max(FINGERTIP_VERTICES):
        raise InputError(f"{what}: {vertices} vertices; the thumb's tip is vertex {max(FINGERTIP_VERTICES)} in MANO's.")
    wanted = {
        "v_template": (vertices, 3),
        "shapedirs": (vertices, 3, SHAPE_COMPONENTS),
        "posedirs": (vertices, 3, 9 * (JOINTS - 1)),
        "j_regressor": (JOINTS, vertices),
        "parents": (JOINTS,),
        "weights": (vertices, JOINTS),
        "faces": (made["faces"].shape[0] if made["faces"].ndim else 0, 3),
        "hands_mean": (45,),
        "hands_components": (made["hands_components"].shape[0] if made["hands_components"].ndim else 0, 45),
    }
    for name, shape in wanted.items():
        if made[name].shape != shape:
            raise InputError(f"{what}: {name} has shape {made[name].shape}, wanted {shape}.")
    _check_values(made, vertices, what)
    return HandModel(**made)


def _check_values(made: Mapping[str, NDArray[Any]], vertices: int, what: str) -> None:
    faces, parents = made["faces"], made["parents"]
    if faces.size and (faces.min() < 0 or faces.max() >= vertices):
        raise InputError(f"{what}: faces name vertices {faces.min()}..{faces.max()}, there are {vertices}.")
    if parents[0] != -1 or not all(0 <= parent < joint for joint, parent in enumerate(parents.tolist()) if joint):
        raise InputError(f"{what}: parents {parents.tolist()} are no tree that starts at joint 0.")
    for name in ("weights", "j_regressor"):
        off = float(np.abs(made[name].sum(axis=1) - 1).max())
        if off > 1e-3:  # MANO's own rows are exact to 1e-6
            raise InputError(f"{what}: a row of {name} sums to 1 only within {off:.2g}.")


def _array(value: Any, kind: str, what: str, name: str) -> NDArray[Any]:
    try:
        found = np.array(value, subok=False)
    except (ValueError, TypeError, OverflowError):  # lists of several lengths, objects that are no numbers
        raise InputError(f"{what}: {name} is no array of numbers.") from None
    if found.dtype.kind not in "iuf":
        raise InputError(f"{what}: {name} holds {found.dtype}, wanted numbers.")
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is refused by what follows
        made = np.ascontiguousarray(found, np.float32 if kind == "f" else np.int64)
    if not (np.isfinite(found).all() and np.isfinite(made).all()):
        raise InputError(f"{what}: {name} holds NaN, infinity, or a number beyond float32.")
    if kind == "i" and not np.array_equal(made, found):
        raise InputError(f"{what}: {name} holds numbers that are no whole ones.")
    if name == "parents" and made.size and made.flat[0] in (-1, 2**32 - 1):  # MANO's unsigned "no parent"
        made.flat[0] = -1
    made.setflags(write=False)
    return made


def _arrays(hand_model: HandModel) -> dict[str, NDArray[Any]]:
    return {field.name: getattr(hand_model, field.name) for field in fields(hand_model)}


# ---- files ----------------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return load_safetensors(path.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a type that numpy lacks
        raise InputError(f"{path}: not a readable safetensors file: {error}") from error


def _read_npz(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zip, npy headers and sizes of a foreign file can fail in any way: the file's fault
        raise InputError(f"{path}: not a readable npz of plain arrays: {error}") from error


_OFFICIAL_NAMES = {"J_regressor": "j_regressor", "f": "faces"}

_CHUMPY = {("chumpy.ch", "Ch"), ("chumpy.reordering", "Select")}
_SPARSE = {
    (f"scipy.sparse{part}", f"{kind}_matrix") for kind in ("csc", "csr") for part in ("", f".{kind}", f"._{kind}")
}
_PICKLE_GLOBALS = (
    dict(NUMPY_GLOBALS) | dict(PLAIN_GLOBALS) | {where: inert_class(*where) for where in sorted(_CHUMPY | _SPARSE)}
)


def _read_pickle(path: Path) -> Mapping[str, Any]:
    found = load_restricted(path.read_bytes(), allowed=_PICKLE_GLOBALS, what=str(path), encoding="latin1")
    if not isinstance(found, dict) or "kintree_table" not in found:
        raise InputError(f"{path}: no MANO pickle: wanted a dictionary with kintree_table, v_template and the rest.")
    try:
        arrays = {_OFFICIAL_NAMES.get(str(name), str(name)): _dense(value) for name, value in found.items()}
        return arrays | {"parents": np.asarray(arrays["kintree_table"])[0]}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: an array of the MANO pickle is malformed: {error!r}") from error


def _dense(value: Any) -> Any:
    """The array that a stored chumpy or scipy object stands for; anything else as it is."""
    if not isinstance(value, Inert):
        return value
    state: Mapping[str, Any] = value.state
    if value.origin == "chumpy.ch.Ch":
        return np.asarray(state["x"])
    if value.origin == "chumpy.reordering.Select":
        shape = tuple(int(length) for length in state["preferred_shape"])
        return np.asarray(_dense(state["a"])).ravel()[np.asarray(state["idxs"])].reshape(shape)
    return _dense_sparse(state, by_column="csc" in value.origin)


def _dense_sparse(state: Mapping[str, Any], by_column: bool) -> NDArray[np.float64]:
    """A scipy compressed-sparse matrix from its three arrays."""
    shape = tuple(int(length) for length in state.get("_shape", state.get("shape")))
    data, indices, starts = (np.asarray(state[name]) for name in ("data", "indices", "indptr"))
    if len(shape) != 2 or max(shape) > 100_000 or shape[0] * shape[1] > 10_000_000:
        raise ValueError(f"a sparse matrix of shape {shape}")
    lines = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    dense = np.zeros(shape)
    rows, columns = (indices, lines) if by_column else (lines, indices)
    np.add.at(dense, (rows, columns), data)
    return dense
