"""What moves a student's weights: AdamW for all of them, or Muon for the matrices of its linear layers.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) makes the momentum of a matrix orthogonal before it steps.
Steps are scaled by 0.2 sqrt(max(rows, columns)) (Moonlight, arXiv:2502.16982), so that one learning rate serves both.
"""

from __future__ import annotations

from functools import partial

import timm.optim.muon
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from trainer.config import StudentRecipe
from trainer.learner import StudentUnderTraining


def optimizer_for(module: StudentUnderTraining, recipe: StudentRecipe, device: torch.device) -> Optimizer:
    """Of all that learns in the module."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if recipe.optimizer == "adamw":
        return AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
    inner = {id(matrix) for matrix in inner_matrices(module)}
    # timm's iteration is in bfloat16 everywhere, which took more than half of a step where a CPU has to imitate it.
    dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    timm.optim.muon.zeropower_via_newtonschulz = partial(_zeropower, dtype=dtype)
    groups = [
        {"params": [parameter for parameter in trained if (id(parameter) in inner) == is_inner], "use_fallback": other}
        for is_inner, other in ((True, False), (False, True))
    ]
    muon: Optimizer = timm.optim.muon.Muon(
        groups, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return muon


def inner_matrices(module: StudentUnderTraining) -> list[Tensor]:
    """Weights of the linear layers of backbone and decoder; not of what reads pictures or says parameters."""
    student = module.student
    layers = [*student.backbone.modules(), *student.mano_head.transformer.modules()]
    return [layer.weight for layer in layers if isinstance(layer, nn.Linear)]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


_zeropower = timm.optim.muon.zeropower_via_newtonschulz
