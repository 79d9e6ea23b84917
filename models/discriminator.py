"""The judge of HaMeR's adversarial pose prior: which hand poses and shapes does it take for a real hand's?

HMR's discriminator (Kanazawa et al. 2018, section 3.3) for the 15 joints of a hand; module names are those of HaMeR's
checkpoints (`discriminator.*`). B samples, J = 15 joints. The losses are in trainer/prior.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.hand_model import SHAPE_COMPONENTS

HAND_JOINTS = 15
OPINIONS = HAND_JOINTS + 2
"""One on each joint's rotation, one on the shape, one on the whole pose."""

_WIDTH, _WHOLE_POSE_WIDTH = 32, 1024


class Discriminator(nn.Module):
    """hand_pose (B,15,3,3) and betas (B,10) to opinions (B,17), trained towards 1 for real hands, 0 for predicted ones.

    1,545,211 parameters. Every joint's rotation is embedded by the same two layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.D_conv1 = nn.Conv2d(9, _WIDTH, kernel_size=1)
        self.D_conv2 = nn.Conv2d(_WIDTH, _WIDTH, kernel_size=1)
        self.pose_out = nn.ModuleList([nn.Linear(_WIDTH, 1) for _ in range(HAND_JOINTS)])
        self.betas_fc1 = nn.Linear(SHAPE_COMPONENTS, 10)
        self.betas_fc2 = nn.Linear(10, 5)
        self.betas_out = nn.Linear(5, 1)
        self.D_alljoints_fc1 = nn.Linear(_WIDTH * HAND_JOINTS, _WHOLE_POSE_WIDTH)
        self.D_alljoints_fc2 = nn.Linear(_WHOLE_POSE_WIDTH, _WHOLE_POSE_WIDTH)
        self.D_alljoints_out = nn.Linear(_WHOLE_POSE_WIDTH, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):  # HMR's start
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # every layer here has one

    def forward(self, hand_pose: Tensor, betas: Tensor) -> Tensor:
        entries_B9J1 = hand_pose.reshape(-1, HAND_JOINTS, 1, 9).permute(0, 3, 1, 2)
        joints_BWJ1 = F.relu(self.D_conv2(F.relu(self.D_conv1(entries_B9J1))))
        each = [judge(joints_BWJ1[:, :, joint, 0]) for joint, judge in enumerate(self.pose_out)]
        shape = self.betas_out(F.relu(self.betas_fc2(F.relu(self.betas_fc1(betas)))))
        whole = F.relu(self.D_alljoints_fc1(joints_BWJ1.flatten(1)))
        whole = self.D_alljoints_out(F.relu(self.D_alljoints_fc2(whole)))
        return torch.cat([*each, shape, whole], dim=1)
