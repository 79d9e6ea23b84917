"""The sections of pipeline.yaml that the offline stages read: `datasets`, `teacher`, `synthesise`, `audit`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from storage.config import Section

Protocol = Literal["freihand", "ho3d", "hint"]


class FilteringConfig(Section):
    """HaMeR's cleaning rules, applied in this order (its configs/data_filtering/low1.yaml)."""

    suppress_keypoint_confidence: float = Field(default=0.3, ge=0)
    """2D confidences below this become 0."""
    suppress_betas: float | None = Field(default=3.0, gt=0)
    """Shape labels with any |beta| above this are not trusted; null: off."""
    poses_betas_simultaneous: bool = True
    """Trust pose and shape labels only together."""
    drop_without_pose: bool = False
    """Leave out hands whose pose is unknown."""
    min_keypoints: int | None = Field(default=4, ge=0)
    """A hand needs MORE than this many 2D keypoints with positive confidence; null: off."""
    max_reprojection_loss: float | None = Field(default=31000.0, gt=0)
    """Leave out fits whose recorded reprojection loss is not below this; null: off."""
    min_box_px: float | None = Field(default=None, gt=0)
    """A hand's box needs MORE than this many pixels on its shorter side; null: off."""
    betas_regularisation: bool = True
    """Where the shape is unknown, teach the mean shape (zeros)."""


class EvaluationFilteringConfig(FilteringConfig):
    """The same rules, all off: evaluation sets are scored whole, nothing is left out unless asked for."""

    suppress_keypoint_confidence: float = Field(default=0.0, ge=0)
    suppress_betas: float | None = Field(default=None, gt=0)
    poses_betas_simultaneous: bool = False
    min_keypoints: int | None = Field(default=None, ge=0)
    max_reprojection_loss: float | None = Field(default=None, gt=0)
    betas_regularisation: bool = False


class HamerTarDataset(Section):
    """HaMeR's WebDataset tars: <key>.jpg + <key>.data.pyd, one dictionary a hand."""

    format: Literal["hamer_tar"]
    path: str | list[str]
    """Tar files; {000000..000130} expands, relative paths start at the configuration file's folder."""
    weight: float = Field(default=1.0, gt=0)
    """Share in the training mix (normalised over the sets a student trains on)."""
    protocol: Protocol | None = None
    """Evaluation rules when the set is evaluated on; null: joints from the labels, PCK from the 2D labels."""
    filtering: FilteringConfig = FilteringConfig()
    """HaMeR's cleaning rules, on as HaMeR has them."""
    licence: str | None = None
    """Under which the set may be used; model cards of exports name it. It decides nothing."""


class HamerNpzDataset(Section):
    """HaMeR's evaluation npz + image folder."""

    format: Literal["hamer_npz"]
    path: str
    image_dir: str
    weight: float = Field(default=1.0, gt=0)
    protocol: Protocol | None = None
    """freihand | ho3d | hint: boxes, joint order, metrics."""
    truth_xyz: str | None = None
    """evaluation_xyz.json of the data set's authors, N x 21 x 3 metres (the npz of HaMeR hold no 3D truth)."""
    truth_verts: str | None = None
    """evaluation_verts.json, N x V x 3 metres."""
    filtering: EvaluationFilteringConfig = EvaluationFilteringConfig()
    """HaMeR's cleaning rules; here all are off unless set."""
    licence: str | None = None
    """As of the other format."""


DatasetConfig = Annotated[HamerTarDataset | HamerNpzDataset, Field(discriminator="format")]


class WorkersConfig(Section):
    """How many teacher actors, and what each takes of a node; `auto` reads the cluster."""

    count: int | Literal["auto"] = "auto"
    gpus: float | Literal["auto"] = "auto"
    cpus: float | Literal["auto"] = "auto"


class TeacherConfig(Section):
    checkpoint: str
    """Lightning checkpoint in HaMeR's layout; model_config.yaml stands in the folder above its own, or beside it."""
    checkpoint_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """When given, the file must have this digest."""
    mano_model: str | None = None
    """MANO_RIGHT.pkl, or open-hand for the built-in open model; null: the checkpoint's own mano.* tensors."""
    batch_size: int = Field(default=64, ge=1)
    """Every forward runs at exactly this size (padded), so it is part of the cache's identity."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    compile: bool = False
    """Run the backbone through torch.compile: minutes at the start of each teacher, and it wants a C++ compiler there.
    It moves the last bits, so it is provenance, as torch's version is."""
    workers: WorkersConfig = WorkersConfig()
    licence: str | None = None
    """Of the checkpoint's weights; model cards of exports name it. It decides nothing."""


class SynthesiseSet(Section):
    """One data set of rendered hands, written where the data set of the same name expects it."""

    hands: int = Field(ge=1)
    seed: int = 0
    """Sets that must not share poses, shapes and backgrounds get different seeds."""


class SynthesiseConfig(Section):
    """Pictures of an open hand model, rendered and written in HaMeR's own formats."""

    hand_model: str = "open-hand"
    sets: dict[str, SynthesiseSet]
    """By data-set name."""

    @field_validator("sets")
    @classmethod
    def _some(cls, sets: dict[str, SynthesiseSet]) -> dict[str, SynthesiseSet]:
        if not sets:
            raise ValueError("names no data set; name at least one, or leave the synthesise section out")
        return sets


class AuditConfig(Section):
    """How `handstill audit` reads caches, and how much it lists."""

    memory_gib: float = Field(default=2.0, gt=0)
    """What it may take of a machine's memory, Python and its libraries included. It decides how many shards are read at
    a time and nothing of the result."""
    worst: int = Field(default=100, ge=1)
    """How many of the samples on which teacher and labels disagree most are listed, for each measure."""
