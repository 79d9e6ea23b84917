"""The sections of pipeline.yaml that the trainer reads: `train`, `students`, `evaluate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from models.sizes import HAMER, IMAGE_SIZE, DecoderSizes, InputPx, VitSizes, input_problem
from storage.config import FeatureGrid, Section

TRAINING_VERSION = 1
"""Part of every student's identity: raise it when the same recipe on the same snapshot would learn differently."""
SCORING_VERSION = 2
"""Part of every evaluation's identity: raise it when the same answers would score differently."""
REPORT_VERSION = 5
"""Raise it when the same scores would be shown differently."""


Item = TypeVar("Item")


def _once(items: list[Item]) -> list[Item]:
    twice = sorted({str(item) for item in items if items.count(item) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} stands in the list more than once")
    return items


Once = Annotated[list[Item], AfterValidator(_once)]


class DistillConfig(Section):
    """What a student learns from the teacher; both null (or 0): a plain student."""

    outputs: float | None = Field(default=None, ge=0)
    """Weight of the output-level loss (MANO parameters, 2D and 3D joints)."""
    features: float | None = Field(default=None, ge=0)
    """Weight of the feature-level loss, a mean over channels and tokens. The paper's 0.3 * 6 = 1.8 stands beside label
    losses summed over its batch of 8; beside those of the corrected preset, means over the batch, its like is 0.225."""
    preset: Literal["corrected", "paper"] = "corrected"
    """paper: Fast-HaMeR's published losses to the bit, its frozen random projection included. corrected: trainable
    projection, sums over points and means over the batch."""
    alignment: Literal["paper", "geometric"] = "paper"
    """paper: the teacher's central 192 columns stretched over the student's 256. geometric: compared where both
    look at the same pixels."""
    projection: Literal["trained", "frozen"] | None = None
    """Of the 1x1 convolution between the student's channels and the teacher's. null: trained in the corrected preset,
    frozen as it was drawn in the paper's, whose optimizer never saw it."""

    at_stride: Literal[8, 16, 32] | None = None
    """Which map of a timm student is compared: its last one of that stride (pixels of its own picture a token); null:
    the last of all, as published. With input_px 128 that has 4x4 tokens, and the one at stride 16 has 8x8, as the
    cache: a student learns sooner there (docs/log.md)."""

    @model_validator(mode="after")
    def _paper_is_whole(self) -> DistillConfig:
        if self.preset == "paper" and self.alignment != "paper":
            raise ValueError("preset paper with alignment geometric: the published losses know only alignment paper")
        if self.preset == "paper" and self.at_stride is not None:
            raise ValueError("preset paper with at_stride: the published losses compare the last map")
        if self.preset == "paper" and self.projection == "trained":
            raise ValueError("preset paper with projection trained: the published one was never trained")
        return self

    @property
    def projection_is_trained(self) -> bool:
        return self.projection != "frozen" and self.preset != "paper"

    @property
    def compared_stride(self) -> Literal[8, 16, 32] | None:
        """`at_stride` where features are compared at all."""
        return self.at_stride if self.features else None

    @property
    def strategy(self) -> str:
        """none | outputs | features | hybrid."""
        names = {(False, False): "none", (True, False): "outputs", (False, True): "features", (True, True): "hybrid"}
        return names[bool(self.outputs), bool(self.features)]


class LossWeights(Section):
    """HaMeR's weights (HAMER_SPEC section 4, LOSS_WEIGHTS of the released model_config.yaml)."""

    keypoints_3d: float = Field(default=0.05, ge=0)
    keypoints_2d: float = Field(default=0.01, ge=0)
    global_orient: float = Field(default=0.001, ge=0)
    hand_pose: float = Field(default=0.001, ge=0)
    betas: float = Field(default=0.0005, ge=0)


class PriorConfig(Section):
    """HaMeR's adversarial prior: a judge that learns which hand poses and shapes are real."""

    weight: float = Field(default=0.0005, gt=0)
    """Of the judge's opinion in the student's loss; HaMeR's LOSS_WEIGHTS.ADVERSARIAL."""
    mocap: str | None = None
    """Real hands: an npz with hand_pose (M,48) and betas (M,10), such as HaMeR's freihand_mocap.npz. null: the trusted
    labels of the batch itself."""


class StudentWorkers(Section):
    """How many processes train one student together, and what each takes of a node. Students train side by side where
    there is room for it."""

    count: int = Field(default=1, ge=1)
    """Data-parallel: each takes its share of every batch, gradients are averaged. The student learns what one process
    would teach it but for the last bits, with two exceptions: layers with batch statistics normalise each share by
    itself (their running statistics are averaged), and drop-out differs (docs/decisions/008)."""
    gpus: float | Literal["auto"] = "auto"
    """auto: one where the cluster has any."""
    cpus: float | Literal["auto"] = "auto"
    """auto: one beside a GPU; else the cores of a node, shared by the `count` workers of one student. A number is also
    how many threads each computes with."""


ShuffleKind = Literal["global", "window"]
"""How the order of an epoch is drawn: over all samples, or over those of a window of shards at a time."""


class TrainOptions(Section):
    """Keys of `train` that a student may override, with their defaults."""

    on: Once[str] = Field(min_length=1)
    """Data sets, mixed by their weights."""
    steps: int = Field(default=100_000, ge=1)
    batch_size: int = Field(default=64, ge=1)
    """Of all workers together."""
    workers: StudentWorkers = StudentWorkers()
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the weights of linear layers, with AdamW for the rest. For transformers that learn from random weights;
    convolutions do not gain by it (docs/log.md)."""
    lr: float = Field(default=1.0e-4, gt=0)
    weight_decay: float = Field(default=1.0e-4, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up from 0."""
    schedule: Literal["constant", "cosine"] = "cosine"
    clip_grad_norm: float | None = Field(default=1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on a CPU. On a CPU with bfloat16 products bf16 trains ConvNeXt 1.7, RepViT 2.7
    and a ViT 3.1 times as fast, MobileNetV3 slower (0.7)."""
    channels_last: bool = True
    compile: bool = False
    """Run the student through torch.compile: minutes before the first step, and it wants a C++ compiler there. Moves
    the losses' last bits, so it is part of the student's identity."""
    average: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, e.g. 0.999: the average is what is validated and kept.
    Its first steps count less (at step n at most 1 - n^(-2/3)). null: the last weights are."""
    colour_jitter: float = Field(default=0.0, ge=0, le=0.5)
    """Extra colour scaling beyond the stored view; the teacher did not see it, so it is off."""
    loss: LossWeights = LossWeights()
    prior: PriorConfig | None = None
    """null: no adversarial pose prior."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=0.5)
    """Share of the training samples (chosen by hash of their id) held out for validation."""
    validation_samples: int = Field(default=2048, ge=1)
    """At most this many samples are held out, so that validating stays cheap on large mixes."""
    validate_every: int = Field(default=1000, ge=1)
    checkpoint_every: int = Field(default=1000, ge=1)
    log_every: int = Field(default=50, ge=1)
    shuffle: Literal["auto"] | ShuffleKind = "auto"
    """global: any sample may come next, which wants the whole cache on a local disk. window: the samples of
    `window_shards` shards are mixed, then those of the next ones. auto: global for local caches, window as soon as one
    lies on an object store."""
    window_shards: int = Field(default=16, ge=1)
    """Of each data set, at most. Twice as many are on the local disk, 165 MB each at 512 samples of 3 views of 8x8 int8
    features; the next ones are fetched while these are in use."""
    disk_cache_gb: float = Field(default=64.0, gt=0)
    """At most so many GB (1e9 bytes) of shards of remote caches are kept on the local disk."""
    loader_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Threads that read and decode ahead of the step; 0: in the training thread. auto: 1 beside training on a CPU, up
    to 8 on a GPU. The order is the same."""


class TrainConfig(TrainOptions):
    seeds: Once[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    """Each student is trained once a seed."""


class _Network(Section):
    """What a student is made of and what it learns from the teacher."""

    backbone: str
    """A timm model name; `hamer` for HaMeR's own ViT, of the sizes `vit`; or torchvision/<name> for the networks of
    Fast-HaMeR's code, in torchvision's names."""
    vit: VitSizes | None = None
    """Sizes of the backbone `hamer`, and of no other; null: ViT-H, the teacher's own."""
    input_px: InputPx = IMAGE_SIZE
    """Side of the picture that the backbone looks at, 128 to 256 in steps of 32. Crops are cached at 256 whatever it
    is and shrink inside the network, so exports take them too."""
    weights: str | None = None
    """Local file of weights to start from; nothing is ever downloaded. The backbone's, in timm's names; or
    weights.safetensors in the folder `student` of a training, which starts head and backbone from that student."""
    head: Literal["paper", "light"] = "paper"
    """paper: HaMeR's decoder (6 layers, 1024 wide, 37 M parameters). light: 2 layers, 256 wide."""
    decoder: DecoderSizes | None = None
    """Sizes of a head that is neither of the two, in place of `head`."""
    distill: DistillConfig = DistillConfig()


class StudentRecipe(_Network, TrainOptions):
    """A student with nothing left open: its own keys over those of `train` over the defaults."""

    @model_validator(mode="after")
    def _shares_are_equal(self) -> StudentRecipe:
        if (problem := shares_problem(self.batch_size, self.workers.count)) is not None:
            raise ValueError(problem)
        return self

    def shuffle_of(self, remote: bool) -> ShuffleKind:
        """The kind that `auto` stands for. remote: whether a cache of the mix lies on an object store."""
        if self.shuffle != "auto":
            return self.shuffle
        return "window" if remote else "global"

    def identity(self, remote: bool = False) -> dict[str, Any]:
        """What decides the trained weights, as JSON; the caller adds digests of the `weights` and `mocap` files."""
        exclude: dict[str, Any] = dict.fromkeys(_NO_EFFECT_ON_WEIGHTS, True) | {"prior": {"mocap"}}
        shuffle = self.shuffle_of(remote)
        exclude |= {"window_shards": True} if shuffle == "global" else {}
        exclude |= {"workers": {"gpus", "cpus"} if self.workers.count > 1 else True}
        # Left out where they decide nothing: as before there were the keys.
        idle = {"projection": self.distill.projection is None, "at_stride": self.distill.compared_stride is None}
        exclude |= {"distill": {key for key, is_idle in idle.items() if is_idle}}
        exclude |= {"optimizer": True} if self.optimizer == "adamw" else {}  # likewise
        exclude |= {"input_px": True} if self.input_px == IMAGE_SIZE else {}  # likewise
        return self.model_dump(mode="json", exclude=exclude) | {"shuffle": shuffle}


_NO_EFFECT_ON_WEIGHTS = {"weights", "log_every", "checkpoint_every", "loader_workers", "disk_cache_gb"}


def _drop_defaults_of_train(schema: dict[str, Any]) -> None:
    """An editor must not show `train`'s defaults in a student: there the default is what `train` says."""
    for name in TrainOptions.model_fields:
        schema["properties"][name].pop("default", None)


class StudentConfig(_Network, TrainOptions):
    """One entry = one MLflow run a seed. Any key of `train` but `seeds` may be given here too."""

    model_config = ConfigDict(json_schema_extra=_drop_defaults_of_train)

    on: Once[str] = Field(default=[], min_length=1)
    """Data sets, mixed by their weights; not given: those of `train`."""

    @model_validator(mode="after")
    def _sizes_have_a_place(self) -> StudentConfig:
        if self.vit is not None and self.backbone != HAMER:
            raise ValueError(
                f"vit gives the sizes of the backbone {HAMER}, and the backbone here is {self.backbone}; "
                f"leave vit out, or set backbone: {HAMER}"
            )
        if (problem := input_problem(self.backbone, self.input_px)) is not None:
            raise ValueError(problem)
        if self.decoder is not None and "head" in self.model_fields_set:
            raise ValueError(f"both head ({self.head}) and decoder say how large the head is; leave one of them out")
        return self

    @model_serializer(mode="wrap")
    def _only_what_was_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        inherited = TrainOptions.model_fields.keys() - self.model_fields_set
        given = {name: getattr(self, name) for name in TrainOptions.model_fields.keys() & self.model_fields_set}
        parts = {
            name: value.model_dump(mode="json", exclude_unset=True)
            for name, value in given.items()
            if isinstance(value, Section)  # inside which the rest is what `train` says, too
        }
        return {key: parts.get(key, value) for key, value in handler(self).items() if key not in inherited}

    def resolve(self, train: TrainConfig) -> StudentRecipe:
        """The full recipe; inside `loss`, too, only the weights given here replace those of `train`."""
        merged = _merge(train.model_dump(exclude={"seeds"}), self.model_dump(exclude_unset=True))
        return StudentRecipe.model_validate(merged)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merge(base[key], value)
        for key, value in over.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | over | both


def shares_problem(batch_size: int, workers: int) -> str | None:
    """Why so many workers cannot share a batch; None: they can."""
    if batch_size % workers == 0:
        return None
    return f"a batch_size of {batch_size} cannot be shared equally by {workers} workers; change one of them"


_SERVED_BY: dict[str, tuple[FeatureGrid, ...]] = {
    "paper": ("8x8-paper", "full"),
    "geometric": ("8x6-geometric", "full"),
}
_CACHED_ROWS: dict[FeatureGrid, int] = {"full": 16, "8x8-paper": 8, "8x6-geometric": 8}


def grid_problem(distill: DistillConfig, grid: FeatureGrid, tokens: tuple[int, int] | None = None) -> str | None:
    """Why a cache of this grid cannot serve this student's feature loss, and which grid would; None: it can.

    tokens: rows and columns of the student's own map, when they are known.
    """
    served_by = _SERVED_BY[distill.alignment]
    if not distill.features:
        return None
    if grid not in served_by:
        return (
            f"distill.features with alignment {distill.alignment} cannot learn from a cache of grid {grid}; "
            f"set cache.features.grid to {' or '.join(served_by)}, or change distill.alignment"
        )
    if tokens is None:
        return None
    rows, columns = tokens
    if distill.alignment == "geometric" and not _tokens_agree(rows, columns, _CACHED_ROWS[grid]):
        return (
            f"alignment geometric found a student's map of {rows}x{columns} tokens, none of whose borders are those of "
            f"the cached {grid} ones; choose a backbone with 8x8 or 16x16 tokens, or set distill.alignment to paper"
        )
    if grid == "8x8-paper" and tokens != (8, 8):
        return (
            f"a cache of grid 8x8-paper cannot teach a student's map of {rows}x{columns} tokens; "
            "set cache.features.grid to full, or distill.at_stride to where its map has 8x8"
        )
    return None


def _tokens_agree(rows: int, columns: int, cached_rows: int) -> bool:
    """Whether every token border of the coarser map is one of the finer map's too.

    A square map covers the whole picture, and the teacher's view is all but an eighth of it on either side; a map
    three quarters as wide as high (a student with the teacher's own backbone) covers just the teacher's view.
    """
    inner = columns - 2 * (columns // 8) if columns == rows and columns % 8 == 0 else columns
    low, high = sorted((rows, cached_rows))
    return inner * 4 == rows * 3 and high % low == 0


class LatencyConfig(Section):
    batch_sizes: list[int] = Field(default=[1, 32], min_length=1)
    warmup: int = Field(default=20, ge=0)
    iterations: int = Field(default=100, ge=1)
    max_seconds: float = Field(default=60.0, gt=0)
    """A batch size that takes longer is measured with fewer iterations, though never with fewer than ten."""
    fused: bool = False
    """Measure students with the branches of RepViT, FastViT and their like joined (`models.student.Student.fused`)."""


class EvaluateConfig(Section):
    on: Once[str] = Field(min_length=1)
    batch_size: int = Field(default=32, ge=1)
    latency: LatencyConfig = LatencyConfig()
    log_cases: bool = True
    """Whether MLflow gets the pictures of the samples that a network answered best and worst, for the report."""


MetricName = Literal[
    "pa_mpjpe_mm", "pa_mpvpe_mm", "mpjpe_mm", "f5", "f15", "auc", "auc_mesh", "pck_05", "pck_10", "pck_15"
]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
"""The metrics of a data set, in the order in which they are shown (trainer.scores)."""


TRAINED = 0.3
"""Of the mean pose's error: whoever takes less off has learned too little for use, and for telling strategies apart."""
REGISTERED = "models:/"
"""What the name of a registered model's version begins with: models:/<name>/<version>, models:/<name>@<alias>."""
METRIC_TITLES: dict[MetricName, str] = {
    "pa_mpjpe_mm": "PA-MPJPE, mm", "pa_mpvpe_mm": "PA-MPVPE, mm", "mpjpe_mm": "MPJPE, mm", "f5": "F@5", "f15": "F@15",
    "auc": "AUC", "auc_mesh": "AUC mesh", "pck_05": "PCK@.05", "pck_10": "PCK@.10", "pck_15": "PCK@.15",
}  # fmt: skip


class GateConfig(Section):
    """What a comparison must show for `handstill compare` to exit with 0. Limits left out are not checked."""

    dataset: str
    """The evaluation set that is looked at."""
    metric: MetricName = "pa_mpjpe_mm"
    """One of the metrics of the comparison; those in mm must be small, the others large."""
    students: list[str] | None = None
    """Each of these must pass, by its mean over seeds; null: the best student must."""
    limit: float | None = Field(default=None, ge=0)
    """Not worse than this value."""
    teacher_ratio: float | None = Field(default=None, gt=0)
    """Not worse than this times the teacher's value."""
    better_than_mean_pose: bool = False
    """Better than answering the same mean pose to every picture."""
    baseline: str | None = None
    """Not worse than this one on the same samples: a student of this file, or a version in MLflow's model registry,
    `models:/<name>@<alias>` or `models:/<name>/<version>`."""
    tolerance: float = Field(default=0.0, ge=0)
    """So much worse than the baseline, in the metric's own unit, is not worse."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of the interval of the difference."""
    in_doubt: Literal["mean", "fails", "passes"] = "mean"
    """What decides when the interval holds both sides of the tolerance: the mean difference; or such a student fails
    (what passes is surely good enough), or passes (what fails is surely worse)."""

    @model_validator(mode="after")
    def _tolerance_of_something(self) -> GateConfig:
        given = self.model_fields_set & {"tolerance", "confidence", "in_doubt"}
        if given and self.baseline is None:
            raise ValueError(f"{', '.join(sorted(given))} without a baseline; name one, or leave it out")
        return self


def _alias(name: str) -> str:
    if name == "latest" or (name[0] in "vV" and name[1:].isdigit()):
        raise ValueError(f"MLflow keeps {name!r} for itself; choose another word")
    return name


class PromoteConfig(Section):
    """What becomes of the best student that passed the gate."""

    model: str | None = Field(default=None, pattern=r"^[^/:@]+$")
    """The registered model whose versions are the winners; null: of the experiment's name."""
    alias: Annotated[str, AfterValidator(_alias)] = Field(default="champion", pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")
    """Points at the last winner: `models:/<model>@<alias>`. It never points at what failed the gate."""


class CompareConfig(Section):
    gate: GateConfig | None = None
    """null: the comparison only reports."""
    promote: PromoteConfig | None = None
    """With this, `handstill compare` registers the best student that passed the gate. null: nothing is registered."""
    bootstrap: int = Field(default=1000, ge=100)
    """Resamplings behind the confidence intervals of paired differences."""
    cases: int = Field(default=6, ge=0, le=24)
    """So many of the samples that the students answered worst, and half as many of the best, are shown."""

    @model_validator(mode="after")
    def _promotes_what_passed(self) -> CompareConfig:
        if self.promote is not None and self.gate is None:
            raise ValueError("promote without a gate: only what passed a gate is registered; add one")
        return self


def better_by(gain: float) -> str:
    """In words, a share by which an error is smaller than the mean pose's, rounded down: 29.9% is less than 30%."""
    if gain <= 0:
        return "no better than"
    percent = int(100 * gain)
    return f"only {percent}% better than" if percent else "hardly better than"
