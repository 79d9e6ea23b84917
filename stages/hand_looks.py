"""What a hand looks like: skin, nails, the arm behind the wrist and its sleeve, as meshes ready to render.

Everything is placed on the hand model's rest pose once (`HandLooks`), then follows the posed hand. The hand's own
frame: wrist turned by nothing, fingers along -x, so that the arm leaves along +x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from models.hand_model import FINGERTIP_VERTICES, HandModel
from stages.hand_poses import BASE_JOINTS, FINGERS, rest_axes
from stages.rendering import Mesh, Texture
from stages.skinning import Floats, rotation_matrices

_SKIN_TONES = np.array(
    [
        [0.80, 0.58, 0.47],
        [0.70, 0.46, 0.34],
        [0.56, 0.34, 0.23],
        [0.38, 0.21, 0.13],
        [0.22, 0.12, 0.075],
        [0.10, 0.055, 0.04],
    ]
)
"""Linear reflectances from the lightest to the darkest type (Fitzpatrick's I to VI, by eye)."""
_PALE = np.array([0.72, 0.46, 0.36])
"""What palms and nails keep of every tone."""


@dataclass(frozen=True)
class Skin:
    """One person's."""

    tone: float
    """0 the lightest to 1 the darkest"""
    redness: float
    """0 to 1, of knuckles and fingertips"""
    gloss: float
    roughness: float
    """deviation of the grain: freckles, pores, hair"""
    seed: int
    """of the blotches"""
    glove: Floats | None = None
    """(3,) linear colour of a glove that hides the skin"""


@dataclass(frozen=True)
class Arm:
    """How the arm leaves the wrist."""

    flexion_rad: float
    """Bend of the wrist towards the palm."""
    deviation_rad: float
    """Bend of the wrist towards the little finger."""
    cuff_m: float
    """How far up the arm the sleeve begins; far away for none."""
    sleeve: Floats
    """(3,) linear colour"""
    sleeve_width: float
    """against the arm's"""


class HandLooks:
    """The parts of a hand's looks that do not depend on its pose."""

    def __init__(self, hand: HandModel) -> None:
        self.faces: NDArray[np.int32] = hand.faces.astype(np.int32)
        self.rim = _boundary(self.faces)
        """Vertices of the mesh's open edge, in order round the wrist."""
        rest = hand.v_template.astype(np.float64)
        joints = hand.j_regressor.astype(np.float64) @ rest
        count = len(rest)
        self._around = scipy.sparse.csr_matrix(
            (np.ones(3 * len(self.faces)), (self.faces.reshape(-1), np.repeat(np.arange(len(self.faces)), 3))),
            shape=(count, len(self.faces)),
        )
        normals = self.normals(rest)
        backs = -rest_axes(hand).abduction
        self.palm = 1 / (1 + np.exp(7 * (normals[:, 1] + 0.1)))
        """(V,) 1 on the palm's side of the flat hand, 0 on its back."""
        self.nail, self.red = np.zeros(count), np.zeros(count)
        for finger, tip in zip(("thumb", *FINGERS), FINGERTIP_VERTICES, strict=True):
            base = BASE_JOINTS[finger]
            knuckles = np.max([_near(rest, joints[joint], 0.009) for joint in range(base, base + 3)], axis=0)
            redness = np.maximum(knuckles * (1 - self.palm), 0.8 * _near(rest, rest[tip], 0.010))
            self.red = np.maximum(self.red, redness)
            self.nail = np.maximum(self.nail, _nail(rest, normals, joints[base + 2], rest[tip], backs[base + 1]))
        self._rest = rest
        self._lines, self._depth = _creases(rest, joints, self.palm)

    def normals(self, vertices: Floats) -> Floats:
        """Unit normals (V, 3), outwards, averaged over the faces around each vertex by their areas."""
        a, b, c = (vertices[self.faces[:, corner]] for corner in range(3))
        summed = self._around @ np.cross(b - a, c - a)
        return np.asarray(summed / (np.linalg.norm(summed, axis=1, keepdims=True) + 1e-12))

    def hand_mesh(self, vertices: Floats, skin: Skin) -> Mesh:
        """The hand itself, in whatever frame its vertices are."""
        place = self._rest + _grain_offset(skin)
        if skin.glove is not None:
            albedo, cloth = np.tile(skin.glove, (len(vertices), 1)), np.zeros(len(vertices))
            texture = Texture(place, cloth + 0.14, self._lines, 0.3 * self._depth)
            return Mesh(vertices, self.normals(vertices), self.faces, albedo, cloth + 0.03, cloth, texture)
        rough = skin.roughness * (1 + 0.8 * self.red - 0.8 * self.nail)
        texture = Texture(place, rough, self._lines, self._depth * (0.6 + 6 * skin.roughness))
        gloss = skin.gloss * (1 + 2.5 * self.nail - 0.5 * self.palm)
        albedo = self.skin_albedo(skin)
        return Mesh(vertices, self.normals(vertices), self.faces, albedo, gloss, 1 - 0.7 * self.nail, texture)

    def skin_albedo(self, skin: Skin) -> Floats:
        """(V, 3): paler palms, pale nails, red knuckles and fingertips, blotches."""
        tone = _skin_tone(skin.tone)
        paler = self.palm[:, None] * (0.15 + 0.45 * skin.tone)
        albedo = tone * (1 - paler) + _PALE * paler
        albedo = albedo * (1 - skin.redness * self.red[:, None] * np.array([0.10, 0.34, 0.36]))
        nail = self.nail[:, None] * (0.35 + 0.4 * skin.tone)
        albedo = albedo * (1 - nail) + (0.85 * _PALE + 0.1) * nail
        blotches = np.random.default_rng(skin.seed)
        waves = np.sin(self._rest @ blotches.normal(0, 220, (3, 6)) + blotches.uniform(0, 6.28, 6)).mean(axis=1)
        grain = blotches.normal(0, 0.03, len(albedo))
        return np.asarray(np.clip(albedo * (1 + 0.16 * waves + grain)[:, None], 0.01, 0.95))

    def arm_meshes(self, vertices: Floats, skin: Skin, arm: Arm) -> list[Mesh]:
        """The forearm and its sleeve behind a hand posed in its own frame, (V, 3); none where the mesh has no rim."""
        if not len(self.rim):
            return []
        rings = _arm_rings(vertices[self.rim], arm)
        along = np.linspace(0, _ARM_LENGTH_M, len(rings))
        bare = min(int(np.searchsorted(along, arm.cuff_m)) + 2, len(rings))
        fading = np.exp(-along[:bare, None, None] / 0.15)  # the arm's inner side is pale like the palm, less and less
        albedo = fading * self.skin_albedo(skin)[self.rim] + (1 - fading) * _skin_tone(skin.tone)
        meshes = [
            _tube(rings[:bare], albedo.reshape(-1, 3), skin.gloss * 0.6, 1.0, skin.roughness, _grain_offset(skin))
        ]
        sleeve = rings[bare - 2 :]
        if arm.cuff_m < 0.6 * _ARM_LENGTH_M:
            middle = sleeve.mean(axis=1, keepdims=True)
            folds = 1 + 0.04 * np.sin(np.arange(len(sleeve)) * 2.1 + skin.seed)[:, None, None]
            wide = middle + (sleeve - middle) * arm.sleeve_width * folds
            colours = np.tile(arm.sleeve, (wide.shape[0] * wide.shape[1], 1))
            meshes.append(_tube(wide, colours, 0.02, 0.0, 0.12, _grain_offset(skin)))
        return meshes


_ARM_LENGTH_M = 0.42
_ARM_RINGS = 17


def _skin_tone(tone: float) -> Floats:
    position = tone * (len(_SKIN_TONES) - 1)
    return np.array([np.interp(position, np.arange(len(_SKIN_TONES)), channel) for channel in _SKIN_TONES.T])


def _boundary(faces: NDArray[np.int32]) -> NDArray[np.int64]:
    """Vertices of the only open edge, in order. A closed mesh has none: an empty array."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    present = set(map(tuple, edges.tolist()))
    following = {a: b for a, b in present if (b, a) not in present}
    if not following:
        return np.zeros(0, dtype=np.int64)
    ring = [min(following)]
    while following[ring[-1]] != ring[0]:
        ring.append(following[ring[-1]])
    return np.array(ring, dtype=np.int64)


def _near(rest: Floats, centre: Floats, reach_m: float) -> Floats:
    """(V,) 1 at the centre, falling off like a bell of this width."""
    return np.asarray(np.exp(-np.sum((rest - centre) ** 2, axis=1) / (2 * reach_m**2)))


def _nail(rest: Floats, normals: Floats, joint: Floats, tip: Floats, back: Floats) -> Floats:
    """(V,) 1 where the nail of the finger that ends at `tip` is; `back` points away from its pad."""
    length = np.linalg.norm(tip - joint)
    bone = (tip - joint) / length
    along = (rest - joint) @ bone / length
    aside = np.linalg.norm(
        np.cross(rest - joint, bone) - ((rest - joint) @ back)[:, None] * np.cross(back, bone), axis=1
    )
    on = (along > 0.48) & (along < 1.02) & (normals @ back > 0.6) & (aside < 0.0065)
    return np.asarray(on, dtype=np.float64)


def _grain_offset(skin: Skin) -> Floats:
    """(3,) metres: where in the grain this person's skin lies."""
    return np.array([skin.seed % 83, skin.seed // 83 % 83, skin.seed // 6889 % 83]) / 1000 + 1.0


_PALM_LINES = ((0.035, 0.016, -0.5), (0.030, -0.004, -0.35), (0.062, 0.022, 0.9))
"""Heart, head and life line in the palm: [x where the line crosses z = 0, metres; z where it bends; slope dx/dz]."""


def _creases(rest: Floats, joints: Floats, palm: Floats) -> tuple[Floats, Floats]:
    """(V, 4) signed distances in metres from the fingers' flexion creases and from three lines of the palm, and how
    dark each is (V, 4)."""
    lines, depth = np.ones((len(rest), 4)), np.zeros((len(rest), 4))
    nearest = np.full(len(rest), np.inf)
    for base in BASE_JOINTS.values():
        for joint in range(base, base + 3):
            bone = joints[joint] - joints[joint - 1] if joint > base else joints[joint + 1] - joints[joint]
            distance = np.linalg.norm(rest - joints[joint], axis=1)
            mine = distance < nearest
            nearest[mine] = distance[mine]
            lines[mine, 0] = ((rest - joints[joint]) @ (bone / np.linalg.norm(bone)))[mine]
    depth[:, 0] = 0.45 * np.exp(-((nearest / 0.014) ** 2))
    inner = palm * (np.abs(rest[:, 2]) < 0.042)
    wrist, knuckle = joints[0, 0], joints[4, 0]
    for number, (start, bend, slope) in enumerate(_PALM_LINES, start=1):
        curve = knuckle + start + slope * (rest[:, 2] - bend) + 6.0 * (rest[:, 2] - bend) ** 2
        lines[:, number] = rest[:, 0] - curve
        depth[:, number] = 0.35 * inner * ((rest[:, 0] < wrist - 0.01) & (rest[:, 0] > knuckle + 0.008))
    return lines, depth


def _arm_rings(rim: Floats, arm: Arm) -> Floats:
    """(rings, rim, 3): the wrist's rim moved up the arm, which bends at the wrist and widens."""
    steps = np.arange(_ARM_RINGS)
    distance = steps * _ARM_LENGTH_M / (_ARM_RINGS - 1)
    bent = np.minimum(1.0, steps / 3)[:, None]  # the bend is over within three rings, eight centimetres
    # Fingers along -x and palm towards -y: the arm turns against the hand about y and z.
    turns = rotation_matrices(bent * [0.0, arm.deviation_rad, 0.0])
    turns = turns @ rotation_matrices(bent * [0.0, 0.0, -arm.flexion_rad])
    middle = rim.mean(axis=0)
    middles = middle + np.cumsum(turns[:, :, 0] * np.diff(distance, prepend=0)[:, None], axis=0)
    width = 1 + 0.6 * np.minimum(1.0, distance / 0.22)
    sections = (rim - middle) * width[:, None, None]
    sections[..., 0] *= 1 - bent  # the rim is slanted, the arm's sections are not
    return np.asarray(middles[:, None] + np.einsum("rab,rkb->rka", turns, sections))


def _tube(rings: Floats, albedo: Floats, gloss: float, softness: float, grain: float, offset: Floats) -> Mesh:
    """A surface through rings (r, k, 3) of points in order."""
    count, around = rings.shape[:2]
    number = np.arange(count * around).reshape(count, around)
    beside = np.roll(number, -1, axis=1)
    faces = np.concatenate(
        [
            np.stack([number[:-1], number[1:], beside[:-1]], axis=-1).reshape(-1, 3),
            np.stack([beside[:-1], number[1:], beside[1:]], axis=-1).reshape(-1, 3),
        ]
    )
    outwards = np.cross(np.gradient(rings, axis=0), np.roll(rings, -1, axis=1) - np.roll(rings, 1, axis=1))
    normals = outwards.reshape(-1, 3)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    centre = rings.mean(axis=1, keepdims=True)
    if np.sum(normals.reshape(rings.shape) * (rings - centre)) < 0:
        normals = -normals
    points, size = rings.reshape(-1, 3), count * around
    texture = Texture.plain(points + offset, grain)
    return Mesh(points, normals, faces.astype(np.int32), albedo, np.full(size, gloss), np.full(size, softness), texture)
