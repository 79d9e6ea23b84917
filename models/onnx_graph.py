"""A student as an ONNX graph of any batch size, norms and branches folded into convolutions; its hand model as npz.

The same student, hand model and versions of torch and onnx give the same bytes: what the exporter notes about the
machine it ran on (paths, stack traces) is taken out.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from models.backbones import TimmBackbone
from models.hand_model import HandModel
from models.mano import ManoLayer
from models.mano_head import ManoHead
from models.sizes import IMAGE_SIZE
from storage.errors import InputError, WorkError

if TYPE_CHECKING:
    import onnx

INPUT = "images"
PARAMETERS = ("global_orient", "hand_pose", "betas", "cam")
JOINTS_AND_MESH = ("keypoints_3d", "vertices")
"""Outputs that need the hand model in the graph."""
BACKBONE, HAND = "backbone", "hand"
"""What the names of the graph's nodes start with: what belongs to the backbone, and the head with all behind it."""

OPSET = 20
"""Of ONNX; the first with Gelu. onnxruntime reads it since 1.17."""
EXTERNAL_FROM_BYTES = 1_500_000_000
"""Larger networks have their weights in a second file, model.onnx.data: protobuf ends at 2 GiB."""


class _Answers(nn.Module):
    """The outputs of a graph, in order, as a tuple."""

    def __init__(self, backbone: nn.Module, mano_head: ManoHead, mano: ManoLayer | None) -> None:
        super().__init__()
        self.backbone, self.mano_head, self.mano = backbone, mano_head, mano

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        hand = self.mano_head(self.backbone(images))
        parameters = tuple(hand[name] for name in PARAMETERS)
        if self.mano is None:
            return parameters
        vertices, keypoints_3d = self.mano(hand["global_orient"], hand["hand_pose"], hand["betas"])
        return (*parameters, keypoints_3d, vertices)


def outputs_of(*, with_hand_model: bool) -> tuple[str, ...]:
    """Names of a graph's outputs, in order."""
    return PARAMETERS + (JOINTS_AND_MESH if with_hand_model else ())


def write_onnx(backbone: nn.Module, mano_head: ManoHead, mano: ManoLayer | None, path: Path) -> None:
    """Write a network's graph, and where it is large its weights beside it. With `mano`, the hand model is inside.

    Input `images` (B,3,256,256), normalised; outputs as `outputs_of` names them. The modules stay as they are.
    Raises InputError where the package is missing, WorkError where this network has no graph of any batch size.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter imports it
    except ImportError as error:
        raise InputError(f"export needs the extra `export`: {error}. pip install 'handstill[export]'") from error
    answers = _Answers(_folded(backbone), mano_head, mano).eval()
    model = _traced(answers, outputs_of(with_hand_model=mano is not None))
    _check_batch(model)
    _name_nodes(model)
    _forget_origins(model)
    large = sum(value.nbytes for value in answers.state_dict().values()) > EXTERNAL_FROM_BYTES
    onnx.save_model(model, str(path), save_as_external_data=large, location=f"{path.name}.data" if large else None)


def hand_model_npz(hand_model: HandModel) -> bytes:
    """The hand model as an npz of plain float32 and int64 arrays, named as the fields of HandModel; equal models give
    equal bytes (numpy's own writer puts the time into them)."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as archive:
        for field in fields(hand_model):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(getattr(hand_model, field.name)), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{field.name}.npy"), member.getvalue())
    return written.getvalue()


def _folded(backbone: nn.Module) -> nn.Module:
    """A copy whose training-time branches (RepViT, FastViT, MobileOne) are one convolution each.

    Batch norms behind convolutions are folded by the exporter.
    """
    folded = copy.deepcopy(backbone).eval()
    if isinstance(folded, TimmBackbone):
        folded.fuse()
    return folded


def _traced(answers: nn.Module, outputs: tuple[str, ...]) -> onnx.ModelProto:
    images = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE, device=next(answers.parameters()).device)
    with _quiet(), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                answers,
                (images,),
                dynamo=True,
                input_names=[INPUT],
                output_names=list(outputs),
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise WorkError(f"torch cannot write this network as ONNX: {str(error).splitlines()[0]}") from error
    model: onnx.ModelProto = program.model_proto
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks about itself are for its authors; what matters is checked afterwards."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_batch(model: onnx.ModelProto) -> None:
    """The exporter falls back to the example's batch size without a word where the network fixes it."""
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    if not batch.dim_param:
        raise WorkError(
            f"this network's graph takes batches of {batch.dim_value} only: its forward fixes the batch size"
        )


def _name_nodes(model: onnx.ModelProto) -> None:
    """Name every node by its part of the network and its place in the graph."""
    for place, node in enumerate(model.graph.node):
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "")
        part = BACKBONE if _first_scope(scopes).startswith("backbone") else HAND
        node.name = f"{part}/{place:04d}_{node.op_type}"


def _first_scope(scopes: str) -> str:
    """The outermost named module of the exporter's note, which reads like "['', 'backbone', 'backbone.body', ...]"."""
    names = [scope.strip(" '\"") for scope in scopes.strip("[]").split(",")]
    return next((name for name in names if name), "")


def _forget_origins(model: onnx.ModelProto) -> None:
    for group in (
        model.graph.node,
        model.graph.value_info,
        model.graph.input,
        model.graph.output,
        model.graph.initializer,
    ):
        for entry in group:
            entry.ClearField("doc_string")
            entry.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
    model.graph.name = "handstill"
