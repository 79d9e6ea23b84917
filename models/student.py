"""Students: a timm backbone (or HaMeR's own ViT at a smaller size) under HaMeR's head and MANO layer.

A student answers the same mapping as the teacher, with `features` (B,C,H,W) of its own backbone: 8 x 8 of the whole
256-pixel crop for most, fewer where it looks at a smaller one, 16 x 12 of the crop's columns 32..224 for `hamer`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError, model_validator
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from models.backbone_names import PREFIX
from models.backbones import TimmBackbone, timm_feature_shape, timm_stage_shape
from models.checkpoint import read_checkpoint
from models.hamer import HamerConfig, hands_from_features
from models.hand_model import HandModel, load_hand_model, save_hand_model
from models.mano import ManoLayer
from models.mano_head import ManoHead
from models.preprocessing import FOCAL_LENGTH_PX
from models.sizes import HAMER, IMAGE_SIZE, DecoderSizes, InputPx, VitSizes, input_problem
from models.torchvision_backbones import TorchvisionBackbone, torchvision_feature_shape
from models.vit import GRID_HW, Vit
from storage.config import Section
from storage.durable import write_bytes_atomic
from storage.errors import DamageError, InputError

_SPEC_FILE, _WEIGHTS_FILE, HAND_FILE = "student.json", "weights.safetensors", "hand_model.safetensors"
STUDENT_FILES = (_SPEC_FILE, _WEIGHTS_FILE, HAND_FILE)
"""All that `Student.load` reads of a folder."""

_HEADS = {"paper": DecoderSizes(), "light": DecoderSizes(dim=256, depth=2, heads=4, dim_head=64, mlp_dim=512)}
"""paper: HaMeR's own, 93% of a MobileNet student's parameters. light: for speed."""


class StudentSpec(Section):
    """What makes a student's network; it is stored beside its weights."""

    backbone: str
    """A timm model name, `hamer` for HaMeR's own ViT, or `torchvision/<name>` (models/torchvision_backbones.py)."""
    input_px: InputPx = IMAGE_SIZE
    """Side of what the backbone looks at: the 256-pixel crop, shrunk inside the network."""
    head: Literal["paper", "light"] = "paper"
    weights: str | None = None
    """Local file of weights to start from; never downloaded, not stored on saving. In timm's names: the backbone's.
    weights.safetensors of another student: all of it, if it is the same network."""
    vit: VitSizes | None = None
    """Sizes of the `hamer` backbone; None: ViT-H."""
    decoder: DecoderSizes | None = None
    """Sizes of a head that is neither paper nor light."""

    @model_validator(mode="after")
    def _vit_only_for_hamer(self) -> StudentSpec:
        if self.vit is not None and self.backbone != HAMER:
            raise ValueError(f"vit gives the sizes of the backbone {HAMER!r}; the backbone here is {self.backbone!r}")
        return self

    @model_validator(mode="after")
    def _hamer_looks_at_256(self) -> StudentSpec:
        if (problem := input_problem(self.backbone, self.input_px)) is not None:
            raise ValueError(problem)
        return self

    @property
    def decoder_sizes(self) -> DecoderSizes:
        return self.decoder or _HEADS[self.head]


class Student(nn.Module):
    """Normalised crops (B,3,256,256) to the mapping of `models.hamer.Hamer`; `features` in the backbone's own shape."""

    def __init__(self, spec: StudentSpec, hand_model: HandModel) -> None:
        super().__init__()
        self.spec = spec
        weights = None if spec.weights is None else Path(spec.weights)
        start = None if weights is None else _whole_student(weights)
        self.backbone = _backbone(spec, weights if start is None else None)
        self.feature_shape = feature_shape(spec)
        """(C,H,W)"""
        self.mano_head = ManoHead(spec.decoder_sizes, self.feature_shape[0])
        self.mano_head.start_from_mean(hand_model)
        self.mano = ManoLayer(hand_model)
        self.is_fused = False
        if start is not None:
            self._start_from(start, weights)

    def _start_from(self, start: dict[str, Tensor], weights: Path | None) -> None:
        wanted = {name: tuple(value.shape) for name, value in learnt(self.state_dict()).items()}
        if (odd := _first_difference(wanted, start)) is not None:
            raise InputError(
                f"{weights}: a student of another network: {odd}. Wanted one with the same backbone and head as this."
            )
        self.load_state_dict(start, strict=False)

    def forward(self, images: Tensor, at_stride: int | None = None) -> dict[str, Tensor]:
        """at_stride: `features` are the backbone's last map of that stride, in place of the one that the head reads."""
        if at_stride is None:
            seen = shown = self.backbone(images)
        else:
            assert isinstance(self.backbone, TimmBackbone), "only timm's networks tell their stages"
            seen, shown = self.backbone.with_stage(images, at_stride)
        return {"features": shown} | hands_from_features(seen, self.mano_head, self.mano, FOCAL_LENGTH_PX)

    @property
    def hand_model(self) -> HandModel:
        return self.mano.hand_model

    @property
    def channels_last_safe(self) -> bool:
        """Whether it may run in channels-last memory: FastViT's training step crashes the interpreter there
        (torch 2.15 on CPUs)."""
        return not self.spec.backbone.startswith("fastvit")

    def fused(self) -> Student:
        """A copy in eval mode for answering only: what RepViT, FastViT and their like train as parallel branches
        becomes the one convolution that it is, the same to rounding. Other backbones stay. It cannot be saved."""
        twin = copy.deepcopy(self).eval()
        if isinstance(twin.backbone, TimmBackbone):
            twin.backbone.fuse()
        twin.is_fused = True
        return twin

    def save(self, folder: Path) -> None:
        """Write a folder that `Student.load` reads on any machine: weights, hand model, and the specification last."""
        assert not self.is_fused, "a fused student has other weights than its specification says"
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: value.clone(memory_format=torch.contiguous_format)  # tied weights may not share memory in the file
            for name, value in learnt(self.state_dict()).items()
        }
        write_bytes_atomic(folder / _WEIGHTS_FILE, save_safetensors(weights))
        save_hand_model(self.hand_model, folder / HAND_FILE)
        stored = _StoredSpec(spec=self.spec.model_copy(update={"weights": None}))
        write_bytes_atomic(folder / _SPEC_FILE, stored.model_dump_json(indent=2).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> Student:
        """A student on the CPU in eval mode: from the folder that `save` wrote, or from a checkpoint of Fast-HaMeR.

        Raises InputError where there is none, DamageError when its files do not belong together.
        """
        folder = Path(path)
        if folder.is_file():
            from models.fast_hamer import load_fast_hamer  # it builds students

            return load_fast_hamer(folder)[0]
        absent = [name for name in STUDENT_FILES if not (folder / name).is_file()]
        if absent:
            wanted = "Wanted a folder students/<name>/seed-<n>/<identity>/student, as training leaves it"
            if (folder / "preprocessing.json").is_file():
                wanted += "; this is an export, which its own handstill_numpy.py runs"
            raise InputError(f"{folder}: no student: {', '.join(absent)} missing. {wanted}.")
        try:
            stored = _StoredSpec.model_validate_json((folder / _SPEC_FILE).read_bytes())
            weights = read_checkpoint(folder / _WEIGHTS_FILE)
            hand_model = load_hand_model(folder / HAND_FILE)
        except (ValidationError, InputError) as error:
            raise DamageError(f"{folder}: not readable as a student: {error}. Train it again: handstill run") from error
        _check_weights(stored.spec, hand_model, weights, folder)
        student = cls(stored.spec, hand_model)
        student.load_state_dict(weights, strict=False)  # all but the hand model's, as was checked
        return student.eval()


class _StoredSpec(Section):
    format_version: Literal[1] = 1
    spec: StudentSpec

    @model_validator(mode="after")
    def _opens_no_other_file(self) -> _StoredSpec:
        if self.spec.weights is not None:  # `save` writes none; a student that was sent to us names no file of ours
            raise ValueError("spec.weights names a file; a stored student has its weights beside it")
        return self


def _check_weights(spec: StudentSpec, hand_model: HandModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Whether the weights are of the network that the specification names, before that takes any memory."""
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in learnt(Student(spec, hand_model).state_dict()).items()}
    if (odd := _first_difference(wanted, weights)) is not None:
        raise DamageError(f"{folder}: the weights are of another network: {odd}. Train it again.")


def learnt(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A student's state without its hand model's."""
    return {name: value for name, value in state.items() if not name.startswith("mano.")}


def _first_difference(wanted: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> str | None:
    """The first entry whose shape is not as wanted, in words; None: all are."""
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            return f"{name} is {found.get(name, 'missing')}, wanted {wanted.get(name, 'none')}"
    return None


def _whole_student(weights: Path) -> dict[str, Tensor] | None:
    """The state of another student, head and all; None: the file is of a backbone alone."""
    state = read_checkpoint(weights)
    return state if any(name.startswith("mano_head.") for name in state) else None


def feature_shape(spec: StudentSpec, at_stride: int | None = None) -> tuple[int, int, int]:
    """(C,H,W) of a student's `features`, without building it. Raises InputError as the student would.

    at_stride: of the backbone's last map of that stride; None: of its last map of all.
    """
    if at_stride is not None:
        if spec.backbone == HAMER or spec.backbone.startswith(PREFIX):
            raise InputError(
                f"at_stride with backbone {spec.backbone}: only timm's networks tell their stages; leave it out."
            )
        return timm_stage_shape(spec.backbone, spec.input_px, at_stride)
    if spec.backbone == HAMER:
        return ((spec.vit or VitSizes()).embed_dim, *GRID_HW)
    if spec.backbone.startswith(PREFIX):
        return torchvision_feature_shape(spec.backbone.removeprefix(PREFIX), spec.input_px)
    return timm_feature_shape(spec.backbone, spec.input_px)


def _backbone(spec: StudentSpec, weights: Path | None) -> nn.Module:
    if spec.backbone.startswith(PREFIX):
        return TorchvisionBackbone(spec.backbone.removeprefix(PREFIX), weights, spec.input_px)
    if spec.backbone != HAMER:
        return TimmBackbone(spec.backbone, weights, spec.input_px)
    vit = Vit(spec.vit or VitSizes())
    if weights is not None:
        try:
            vit.load_state_dict(read_checkpoint(weights), strict=True)
        except RuntimeError as error:
            raise InputError(f"{weights}: not the weights of HaMeR's backbone at {spec.vit}: {error}") from error
    return vit


def export_hamer_checkpoint(student: Student, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a student of backbone `hamer` in the official layout, for `load_teacher`: a teacher of one's own making.

    `folder`/checkpoints/hamer.ckpt and `folder`/model_config.yaml. The hand model is left out: name it beside the
    checkpoint. Halves keep three decimal digits; the loader widens them. Raises InputError for another backbone.
    """
    if student.spec.backbone != HAMER:
        raise InputError(f"backbone {student.spec.backbone!r}: only {HAMER!r} has HaMeR's checkpoint layout.")
    config = HamerConfig(vit=student.spec.vit or VitSizes(), decoder=student.spec.decoder_sizes)
    state = {name: value.to(dtype) for name, value in learnt(student.state_dict()).items()}
    lightning = {"epoch": 0, "global_step": 0, "state_dict": state, "hyper_parameters": {}}
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(lightning, folder / "checkpoints" / "hamer.ckpt")
    (folder / "model_config.yaml").write_text(config.to_yaml())
