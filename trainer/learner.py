"""All that trains, in one module: the student, and the projection that makes its features comparable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.preprocessing import normalise
from models.student import Student, StudentSpec, feature_shape
from storage.config import FeatureGrid
from trainer.config import DistillConfig, StudentRecipe
from trainer.data import FEATURES, FEATURES_SCALE, LABELS, PICTURES, TEACHER_OUTPUTS
from trainer.features import FeatureDecoder
from trainer.losses import FeatureLoss, label_losses, output_losses, weighted

Tensors = dict[str, Tensor]


def keys_for(distill: DistillConfig) -> tuple[str, ...]:
    """What of a cache a student with these losses reads."""
    return (
        PICTURES,
        *LABELS,
        *(TEACHER_OUTPUTS if distill.outputs else ()),
        *((FEATURES,) if distill.features else ()),
    )


def student_spec(recipe: StudentRecipe, weights: Path | None = None) -> StudentSpec:
    """The network that a recipe names. weights: its pretrained backbone, already found."""
    return StudentSpec(
        backbone=recipe.backbone,
        input_px=recipe.input_px,
        vit=recipe.vit,
        head=recipe.head,
        decoder=recipe.decoder,
        weights=None if weights is None else str(weights),
    )


class StudentUnderTraining(nn.Module):
    """A student and its losses. The optimizer gets `parameters()`, so nothing that learns can be forgotten."""

    def __init__(
        self,
        student: Student,
        recipe: StudentRecipe,
        grid: FeatureGrid,
        teacher_dim: int,
        decoder: FeatureDecoder | None = None,
    ) -> None:
        """grid, teacher_dim: of the cache's features, decoded. decoder: of the stored ones; None: float16 or int8."""
        super().__init__()
        self.student = student
        self.recipe = recipe
        self.memory_format = torch.contiguous_format
        if recipe.channels_last and student.channels_last_safe:
            self.memory_format = torch.channels_last
        self.decoder = decoder or FeatureDecoder()
        self.at_stride: int | None = recipe.distill.compared_stride
        """Of the map that `features` are; None: the last."""
        self.feature_loss: FeatureLoss | None = None
        if recipe.distill.features:
            shape = feature_shape(student.spec, self.at_stride)
            self.feature_loss = FeatureLoss(recipe.distill, grid, shape, teacher_dim)

    def forward(self, pictures: Tensor) -> Tensors:
        """The student's answers to uint8 RGB pictures (B,256,256,3), float32 whatever the autocast."""
        images = normalise(pictures).contiguous(memory_format=self.memory_format)
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=self.bf16(pictures.device)):
            outputs = self.student(images, self.at_stride)
        return {name: value.float() for name, value in outputs.items()}

    def bf16(self, device: torch.device) -> bool:
        """Whether the student's forward runs in bfloat16 there."""
        return self.recipe.precision == "bf16" or (self.recipe.precision == "auto" and device.type == "cuda")

    def losses(self, batch: Tensors, workers: int = 1) -> tuple[Tensor, Tensors, Tensors]:
        """The loss to minimise, its parts (mean a sample, unweighted, detached), and the student's answers.

        batch: tensors by the cache's keys (`keys_for`). workers: this is the share of one of so many: the mean of all
        their losses is the whole batch's, also where the preset sums over the batch.
        """
        distill, weights = self.recipe.distill, self.recipe.loss
        outputs = self(batch[PICTURES])
        labels = label_losses(outputs, _group(batch, "labels/"))
        per_sample, parts = weighted(labels, weights), _means("label", labels)
        if distill.outputs:
            teacher = output_losses(outputs, _group(batch, "teacher/"))
            per_sample = per_sample + distill.outputs * weighted(teacher, weights)
            parts |= _means("teacher", teacher)
        total = per_sample.sum() * workers if distill.preset == "paper" else per_sample.mean()
        if distill.features and self.feature_loss is not None:
            taught = self.decoder(batch[FEATURES], batch.get(FEATURES_SCALE))
            features = self.feature_loss(outputs["features"], taught).mean()
            total = total + distill.features * features
            parts["teacher/features"] = features.detach()
        return total, parts, outputs


def _group(batch: Mapping[str, Tensor], prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}


def _means(group: str, losses: Mapping[str, Tensor]) -> Tensors:
    return {f"{group}/{name}": value.detach().mean() for name, value in losses.items()}
