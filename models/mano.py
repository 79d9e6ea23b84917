"""The MANO layer: shape and joint rotations in, mesh and 21 joints out. The model's numbers: `models.hand_model`.

B batch, V vertices, J = 16 joints in MANO's kinematic order, 21 keypoints in OpenPose order. Metres, camera axes
(x right, y down, z forward); the hand turns about its wrist joint, so the output is not centred on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import smplx
import torch
from smplx.utils import Struct
from torch import Tensor

from models.hand_model import FINGERTIP_VERTICES, HandModel

OPENPOSE_ORDER = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)
"""Rows of [16 joints, 5 fingertips] in OpenPose's order: wrist, then thumb, index, middle, ring, pinky from the base
to the tip (HaMeR's mano_wrapper.py)."""


class ManoLayer(smplx.MANOLayer):  # type: ignore[misc]  # smplx ships no types
    """A hand model as a layer without parameters; its state-dict names are those under `mano.` in HaMeR's checkpoints.

    smplx builds the buffers. The forward is ours: smplx reads the kinematic tree off the device joint by joint, which
    stops the GPU fifteen times; here joints of equal depth move together, in three products.
    """

    SHAPE_SPACE_DIM = 10  # smplx prints a warning about ten components otherwise

    v_template: Tensor
    shapedirs: Tensor
    posedirs: Tensor
    J_regressor: Tensor
    lbs_weights: Tensor
    joint_map: Tensor
    by_level: Tensor
    parent_in_level: Tensor
    from_levels: Tensor
    extra_joints_idxs: Tensor

    def __init__(self, hand_model: HandModel) -> None:
        super().__init__(model_path="", data_struct=_smplx_struct(hand_model), create_body_pose=False)
        # The two buffers that HaMeR's own subclass of smplx's layer adds, under its names.
        self.register_buffer("extra_joints_idxs", torch.tensor(FINGERTIP_VERTICES))
        self.register_buffer("joint_map", torch.tensor(OPENPOSE_ORDER))
        self.hand_model = hand_model
        tree = _LevelOrder.of(hand_model.parents.tolist())
        self.levels = tree.levels
        self.register_buffer("by_level", torch.tensor(tree.joints), persistent=False)
        self.register_buffer("parent_in_level", torch.tensor(tree.parent_in_level), persistent=False)
        self.register_buffer("from_levels", torch.tensor(tree.joints).argsort(), persistent=False)

    def forward(self, global_orient: Tensor, hand_pose: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
        """Pose the hand.

        global_orient (B,1,3,3) and hand_pose (B,15,3,3): rotation matrices, absolute (no mean pose is added);
        betas (B,10). Returns vertices (B,V,3) and keypoints (B,21,3), metres, float32 under autocast too.
        """
        with torch.autocast(betas.device.type, enabled=False):
            return self._posed(torch.cat([global_orient, hand_pose], dim=1).float(), betas.float())

    def _posed(self, rotations_BJ33: Tensor, betas_BL: Tensor) -> tuple[Tensor, Tensor]:
        batch = rotations_BJ33.shape[0]
        shaped_BV3 = self.v_template + torch.einsum("bl,vkl->bvk", betas_BL, self.shapedirs)
        rest_BJ3 = torch.einsum("bvk,jv->bjk", shaped_BV3, self.J_regressor)
        bend_BP = (rotations_BJ33[:, 1:] - torch.eye(3, device=betas_BL.device)).reshape(batch, -1)
        unposed_BV3 = shaped_BV3 + (bend_BP @ self.posedirs).view(batch, -1, 3)

        turn_BJ33, joints_BJ3 = self._chain(rotations_BJ33, rest_BJ3)
        shift_BJ3 = joints_BJ3 - (turn_BJ33 @ rest_BJ3[..., None])[..., 0]
        columns_BJ43 = torch.cat([turn_BJ33.transpose(2, 3), shift_BJ3[:, :, None]], dim=2)
        x_BV3, y_BV3, z_BV3, shift_BV3 = (self.lbs_weights @ columns_BJ43.flatten(2)).chunk(4, dim=2)
        vertices_BV3 = (
            x_BV3 * unposed_BV3[..., 0:1] + y_BV3 * unposed_BV3[..., 1:2] + z_BV3 * unposed_BV3[..., 2:3] + shift_BV3
        )
        points = torch.cat([joints_BJ3, vertices_BV3[:, self.extra_joints_idxs]], dim=1)
        return vertices_BV3, points[:, self.joint_map]

    def _chain(self, rotations_BJ33: Tensor, rest_BJ3: Tensor) -> tuple[Tensor, Tensor]:
        """Each joint's rotation (B,J,3,3) and place (B,J,3) in the camera's frame."""
        rotations_BJ33, rest_BJ3 = rotations_BJ33[:, self.by_level], rest_BJ3[:, self.by_level]
        turns, rests, places = [rotations_BJ33[:, :1]], [rest_BJ3[:, :1]], [rest_BJ3[:, :1]]
        for level in self.levels:  # N joints of one depth; their parents are all in the level above
            parent = self.parent_in_level[level]
            turn_BN33, rest_BN3 = turns[-1][:, parent], rest_BJ3[:, level]
            bone_BN31 = (rest_BN3 - rests[-1][:, parent])[..., None]
            places.append(places[-1][:, parent] + (turn_BN33 @ bone_BN31)[..., 0])
            turns.append(turn_BN33 @ rotations_BJ33[:, level])
            rests.append(rest_BN3)
        return torch.cat(turns, dim=1)[:, self.from_levels], torch.cat(places, dim=1)[:, self.from_levels]


@dataclass(frozen=True)
class _LevelOrder:
    """The joints sorted by their depth in the tree, so that a level is a slice."""

    joints: list[int]
    parent_in_level: list[int]
    """Where each of `joints` finds its parent within the level above."""
    levels: list[slice]
    """Below the wrist."""

    @classmethod
    def of(cls, parents: list[int]) -> _LevelOrder:
        depth = [0] * len(parents)
        for joint, parent in enumerate(parents[1:], start=1):
            depth[joint] = depth[parent] + 1
        joints = sorted(range(len(parents)), key=lambda joint: (depth[joint], joint))
        starts = [sum(at < level for at in depth) for level in range(max(depth) + 2)]
        slots = [0] + [joints.index(parents[joint]) - starts[depth[joint] - 1] for joint in joints[1:]]
        return cls(joints, slots, [slice(*starts[level : level + 2]) for level in range(1, max(depth) + 1)])


def _smplx_struct(hand_model: HandModel) -> Struct:
    return Struct(
        v_template=hand_model.v_template,
        shapedirs=hand_model.shapedirs,
        posedirs=hand_model.posedirs,
        J_regressor=hand_model.j_regressor,
        kintree_table=hand_model.parents[None],
        weights=hand_model.weights,
        f=hand_model.faces,
        hands_mean=hand_model.hands_mean,
        hands_components=hand_model.hands_components,
    )
