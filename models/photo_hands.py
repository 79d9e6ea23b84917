"""From a photograph and hands' boxes to joints, meshes and MANO parameters in the photograph's own frames.

What users of HaMeR must put together from its demo, in one place; docs/conventions.md draws the frames. Everything
that comes out is of the hand that is seen: left hands are mirrored on their way into the network, and back here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.crops import DEMO_BOX, HINT_BOX, BoxRule, Crop, Picture, camera_in_photo, crop, to_photo_px
from models.hand_box import HandBox
from models.hand_model import HandModel
from models.preprocessing import normalise

Floats = NDArray[np.float64]
Network = Callable[[Tensor], dict[str, Tensor]]

HANDS_AT_ONCE = 8
"""Hands in one forward pass: bounds the memory, whatever a photograph shows."""
RESCALE = 2.0
"""A tight box times this is what networks see, as in HaMeR's demo and for HInt."""
DOT_SPAN = 0.05
"""A hand whose joints take less of its square is no answer: even a finger that points at the camera takes more."""


@dataclass(frozen=True, eq=False)
class PredictedHand:
    """One hand. Camera frame: x right, y down, z forward, metres, the photograph's camera at the origin."""

    box: HandBox
    square_px: tuple[float, float, float]
    """x and y of the middle and the side of the square that the network saw, photo px."""
    joints_2d_px: Floats
    """(21, 2) photo px, OpenPose order: what the network says of the picture itself."""
    joints_3d_m: Floats
    """(21, 3) camera frame. Take joint 0, the wrist, away for the hand by itself: the depth is a convention."""
    vertices_m: Floats
    """(V, 3) camera frame."""
    faces: NDArray[np.int64]
    """(F, 3) of vertices, anticlockwise seen from outside: turned round for a left hand."""
    global_orient: Floats
    """(3, 3) rotation of MANO's right hand; a left hand's is that of its mirror image, as networks give it."""
    hand_pose: Floats
    """(15, 3, 3) likewise, absolute: no mean pose is to be added."""
    betas: Floats
    """(10,)"""
    cam: Floats
    """(3,) s, tx, ty: the camera of the crop, as networks give it."""
    translation_m: Floats
    """(3,) what was added to MANO's output, after mirroring, to stand before the photograph's camera."""
    focal_px: float
    principal_point_px: Floats
    """(2,) the photograph's middle: width / 2, height / 2, as in HaMeR."""

    @property
    def projected_px(self) -> Floats:
        """(21, 2) the 3D joints seen by the photograph's camera, photo px."""
        return self.project(self.joints_3d_m)

    @property
    def disagreement_px(self) -> float:
        """The farthest that a joint's projection lies from where the network put it in the picture."""
        return float(np.linalg.norm(self.projected_px - self.joints_2d_px, axis=1).max())

    @property
    def span(self) -> float:
        """The longer side that the joints take in the picture, as a share of the square's; a hand takes about half."""
        return float(np.ptp(self.joints_2d_px, axis=0).max()) / self.square_px[2]

    @property
    def is_dot(self) -> bool:
        """Whether the network shrank the hand to next to nothing: it does not know which way the hand points."""
        return not self.span >= DOT_SPAN  # nan too

    @property
    def in_front(self) -> bool:
        """Whether the whole hand lies before the camera; an untrained network may say otherwise."""
        return bool(np.isfinite(self.vertices_m).all() and self.vertices_m[:, 2].min() > 0)

    def project(self, points_m: Floats) -> Floats:
        """Camera frame (..., 3) to photo px (..., 2)."""
        return np.asarray(points_m[..., :2] / points_m[..., 2:] * self.focal_px + self.principal_point_px)


class HandPredictor:
    """A network that looks at the hands of whole photographs."""

    def __init__(
        self,
        network: nn.Module,
        hand_model: HandModel,
        *,
        sees_inner_columns: bool,
        rescale: float = RESCALE,
        device: str | torch.device = "cpu",
    ) -> None:
        """network: normalised crops to the mapping of `models.hamer.Hamer`; in eval mode.

        sees_inner_columns: a ViT of HaMeR's sees columns 32..224 of its crop and gets a wider square for it.
        rescale: a box times this is seen; 1 where the boxes are not tight.
        """
        self.network = network.to(device).eval()
        self.device = torch.device(device)
        self.rule: BoxRule = replace(DEMO_BOX if sees_inner_columns else HINT_BOX, rescale=rescale)
        self._faces = hand_model.faces

    def __call__(
        self, picture: Picture, boxes: Sequence[HandBox], *, focal_px: float | None = None
    ) -> list[PredictedHand]:
        """The hands in boxes of an RGB photograph (H, W, 3) uint8, in the order of the boxes.

        focal_px: of the camera that took it; None: HaMeR's assumption, 5000 / 256 times the longer side.
        Raises InputError for a box that cuts no hand out of it.
        """
        height, width = picture.shape[:2]
        for box in boxes:
            box.check(width, height, self.rule)
        hands = []
        for start in range(0, len(boxes), HANDS_AT_ONCE):
            some = boxes[start : start + HANDS_AT_ONCE]
            crops = [crop(picture, box.center, box.square_px(self.rule), box.right, antialias=True) for box in some]
            said = self._look(np.stack([cut.picture for cut in crops]))
            hands += [
                _in_photo(box, cut, {name: value[i] for name, value in said.items()}, picture, self._faces, focal_px)
                for i, (box, cut) in enumerate(zip(some, crops, strict=True))
            ]
        return hands

    @torch.inference_mode()
    def _look(self, crops: NDArray[np.uint8]) -> dict[str, Floats]:
        said = self.network(normalise(torch.from_numpy(crops).to(self.device)))
        return {name: value.double().cpu().numpy() for name, value in said.items() if name != "features"}


def _in_photo(
    box: HandBox,
    cut: Crop,
    said: dict[str, Any],
    picture: Picture,
    faces: NDArray[np.int64],
    focal_px: float | None,
) -> PredictedHand:
    height, width = picture.shape[:2]
    translation, focal = camera_in_photo(said["cam"], cut, width, height, focal_px)
    mirror = np.array([-1.0, 1.0, 1.0]) if cut.mirrored else np.ones(3)
    return PredictedHand(
        box=box,
        square_px=(float(cut.center[0]), float(cut.center[1]), cut.box_px),
        joints_2d_px=to_photo_px(said["keypoints_2d"], cut.affine),
        joints_3d_m=said["keypoints_3d"] * mirror + translation,
        vertices_m=said["vertices"] * mirror + translation,
        faces=faces[:, ::-1] if cut.mirrored else faces,
        global_orient=said["global_orient"][0],
        hand_pose=said["hand_pose"],
        betas=said["betas"],
        cam=said["cam"],
        translation_m=translation,
        focal_px=focal,
        principal_point_px=np.array([width / 2, height / 2]),
    )
