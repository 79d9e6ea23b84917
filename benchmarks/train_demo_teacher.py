"""Train the small teacher of the demo on synthesised hands, and write it as a checkpoint in HaMeR's layout.

    python benchmarks/train_demo_teacher.py FOLDER [--pictures 40000] [--steps 15000]
    python benchmarks/train_demo_teacher.py FOLDER --export models/assets/demo_teacher

Renders the training pictures into FOLDER first (about eleven minutes on two cores), then trains a student whose
backbone is HaMeR's own by the trainer's loop (`trainer.loop.train`): stopped and started again it goes on from its
last checkpoint. `--export` writes the best network so far; `--start-from` trains another one further, such as
models/assets/demo_teacher/checkpoints/hamer.ckpt.

Only what it learns from is of its own. No teacher has looked at these pictures, so nothing ties it to stored views, and
every step cuts and colours new ones, half of them as other cameras would have them. And since a vision transformer
learns slowly from few pictures, it starts with filters that whiten patches and with attention to neighbours, and while
it trains each token also says which joints and which parts of the hand it sees; the layer that says so is left out of
the checkpoint. With `--tokens 64` most steps look at a third of each picture's tokens, at those on the hand more often
than at others, and take less than half the time.

On a GPU one process trains and one a core prepares its batches. On a CPU it is one process of one thread a core.
Products are in bfloat16 where the machine has them; where a CPU has to imitate them they are twenty times as slow as in
float32 (docs/log.md has both machines).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from models.checkpoint import read_checkpoint
from models.crops import (
    IDENTITY,
    STUDENT_BOX,
    TEACHER_BOX,
    Augmentation,
    BoxRule,
    HandLabels,
    crop,
    draw_augmentation,
    move_labels,
)
from models.hamer import hands_from_features
from models.hand_model import OPEN_HAND, HandModel, load_hand_model
from models.preprocessing import FOCAL_LENGTH_PX, normalise
from models.sizes import DecoderSizes, VitSizes
from models.student import Student, StudentSpec, export_hamer_checkpoint
from models.vit import GRID_HW, Vit
from stages.config import HamerNpzDataset, SynthesiseConfig, SynthesiseSet
from stages.skinning import pose_hand, rotation_matrices
from stages.synthesise import run_unit, synthesise_units, unit_done
from storage.durable import canonical_json, sha256_bytes
from trainer.config import StudentRecipe
from trainer.data import LABELS, PICTURES, Batch
from trainer.distributed import Group
from trainer.job import STUDENT, Silent, TrainJob
from trainer.learner import StudentUnderTraining, Tensors
from trainer.lessons import Lessons
from trainer.loop import train
from trainer.losses import label_losses, points_3d, rotations, weighted
from trainer.metrics import mpjpe_mm, pa_mpjpe_mm
from trainer.optimizing import has_bfloat16

SIZES = VitSizes(embed_dim=192, depth=8, num_heads=3)
SPEC = StudentSpec(
    backbone="hamer",
    vit=SIZES,
    decoder=DecoderSizes(dim=192, depth=2, heads=6, dim_head=32, mlp_dim=384),
)
BATCH = {"cpu": 128, "cuda": 256}
"""Of all processes together, by the kind of device."""
RECIPE: dict[str, Any] = {
    "on": ["synthesised"],
    "backbone": SPEC.backbone,
    "vit": SIZES,
    "decoder": SPEC.decoder,
    "optimizer": "muon",
    "lr": 1.5e-3,
    "weight_decay": 0.05,
    "warmup_steps": 100,
    "average": 0.998,
    "loss": {"keypoints_3d": 0.15, "keypoints_2d": 0.03, "global_orient": 0.02, "hand_pose": 0.02, "betas": 0.0005},
    "validate_every": 125,
    "checkpoint_every": 125,
}
TOKEN_LOSS_WEIGHT = 2.0
"""Of what the tokens say, at first; it falls evenly to nothing at the last step. At 0.3 all errors fall more slowly,
the hand's too (docs/log.md)."""
WHOLE_EVERY, WHOLE_AT_LAST = 16, 0.06
"""Every so manyth step sees whole pictures whatever `--tokens` says, and so does the last share of them: a network that
sees nothing but parts is 0.5 mm worse on wholes than on parts, as where tokens lie tells it where the hand is."""
CHUNK, HELD_OUT = 1000, 500
SEEDS = {"train": 1000, "held-out": 2000}
"""Apart from those of the sets that pipeline.yaml synthesises: the demo must not meet its teacher's pictures."""
TEACHER_BOX_SHARE = 0.35
"""Of views cut as HaMeR is evaluated, with a wider box than it is trained with."""
ALL_TOKENS = GRID_HW[0] * GRID_HW[1]
HAND_TOKENS_FIRST = 30.0
"""How much more readily a token on the hand is kept than another, where not all are: 96 of 192 have 98% of the
hand's at 10 and 64 of 192 have 94% at 30; a network that knows whole pictures answers 96 of them at 10 0.1 mm worse
(0.3 mm at 4, 2.2 mm at 1; docs/log.md)."""
OWN_FRAME_WEIGHT = 0.3
"""Of `own_frame_loss`, beside HaMeR's losses as RECIPE weighs them."""


@dataclass(frozen=True)
class Places:
    """Where the places of a map lie in a crop of 256 px."""

    rows: int
    columns: int
    side_px: int
    left_px: int
    top_px: int


TOKENS = Places(*GRID_HW, side_px=16, left_px=32 - 2, top_px=-2)  # the embedding pads by two
KEYPOINTS_2D, KEYPOINTS_3D = "labels/keypoints_2d", "labels/keypoints_3d"
PART_VERTICES = slice(None, None, 4)
"""Enough to say which tokens see a part."""


@dataclass(frozen=True)
class Pictures:
    """A synthesised set: files of pictures, labels in the picture's frame, where its vertices lie (px)."""

    files: list[Path]
    arrays: dict[str, NDArray[Any]]
    vertices_px: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.files)

    def view(
        self, index: int, augmentation: Augmentation = IDENTITY, box: BoxRule = STUDENT_BOX
    ) -> tuple[NDArray[np.uint8], HandLabels, NDArray[np.float32]]:
        """The 256 x 256 crop, its labels as HaMeR's training makes them, and its vertices (V, 2) in crop px."""
        image = cv2.cvtColor(cv2.imread(str(self.files[index])), cv2.COLOR_BGR2RGB)
        row = {name: values[index] for name, values in self.arrays.items()}
        pose, betas = row["hand_pose"].astype(np.float32), row["betas"].astype(np.float32)
        labels = HandLabels(row["hand_keypoints_2d"], row["hand_keypoints_3d"], pose[:3], pose[3:], betas)
        cut = crop(image, row["center"], box.side_px(row["scale"] / 200), bool(row["right"]), augmentation)
        vertices = self.vertices_px[index] @ cut.affine[:, :2].T + cut.affine[:, 2]
        return cut.picture, move_labels(labels, cut, augmentation), vertices.astype(np.float32)


def render(folder: Path, chunk: int, name: str = "train", hands: int = CHUNK) -> Pictures:
    """One file of a set, rendered if it is not there yet."""
    place = f"{name}-{chunk:03d}"
    dataset = HamerNpzDataset(format="hamer_npz", path=f"{place}/hands.npz", image_dir=f"{place}/rgb")
    config = SynthesiseConfig(sets={place: SynthesiseSet(hands=hands, seed=SEEDS[name] + chunk)})
    for unit in synthesise_units(config, {place: dataset}, folder):
        if not unit_done(unit):
            run_unit(unit)
            print(f"rendered {place}", flush=True)
    with np.load(folder / place / "hands.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    projected = folder / place / "vertices_px.npy"
    if not projected.exists():
        np.save(projected, _vertices_px(arrays))
    return Pictures([folder / place / "rgb" / str(file) for file in arrays["imgname"]], arrays, np.load(projected))


def chunks_of(arguments: argparse.Namespace) -> range:
    """The files that hold the pictures asked for."""
    return range(arguments.skip_pictures // CHUNK, -(-(arguments.skip_pictures + arguments.pictures) // CHUNK))


def render_all(folder: Path, chunks: range) -> None:
    """Every file, a process a core."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for _ in pool.imap_unordered(partial(_render_quietly, folder), chunks):
            pass


def _render_quietly(folder: Path, chunk: int) -> None:
    render(folder, chunk)


def together(sets: list[Pictures]) -> Pictures:
    """One set of several."""
    arrays = {name: np.concatenate([each.arrays[name] for each in sets]) for name in sets[0].arrays}
    files = [file for each in sets for file in each.files]
    return Pictures(files, arrays, np.concatenate([each.vertices_px for each in sets]))


def _vertices_px(arrays: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    """(n, V, 2): where the camera that took the labels' joints sees the vertices."""
    hand = load_hand_model("open-hand")
    seen = []
    for index in range(len(arrays["right"])):
        row = {name: values[index] for name, values in arrays.items()}
        mirror = np.array([1, 1, 1]) if row["right"] else np.array([-1, 1, 1])
        pose = row["hand_pose"].reshape(16, 3) * (mirror if row["right"] else [1, -1, -1])
        vertices, joints = pose_hand(hand, rotation_matrices(pose), row["betas"])
        truth = row["hand_keypoints_3d"][:, :3]
        points = (vertices[PART_VERTICES] - joints[0]) * mirror + truth[0]
        camera = np.stack([truth[:, 0] / truth[:, 2], np.ones(21)], axis=1)
        focal_px, centre_px = np.linalg.lstsq(camera, row["hand_keypoints_2d"][:, 0], rcond=None)[0]
        seen.append(points[:, :2] / points[:, 2:] * focal_px + centre_px)
    return np.stack(seen).astype(np.float32)


def batch_of(pictures: Pictures, indices: NDArray[np.int64], rng: np.random.Generator | None = None) -> Batch:
    """A batch as the trainer's caches give it, with `vertices_px` beside; without a generator the plain crops."""
    plans = [(IDENTITY, STUDENT_BOX) if rng is None else _drawn(rng) for _ in indices]
    views = [pictures.view(int(i), *plan) for i, plan in zip(indices, plans, strict=True)]
    seen = [picture if rng is None else weathered(picture, rng) for picture, _, _ in views]
    made: Batch = {PICTURES: np.stack(seen)}
    made["vertices_px"] = np.stack([vertices for _, _, vertices in views])
    made["sample_id"] = np.array([f"{pictures.files[i].parents[1].name}/{pictures.files[i].stem}" for i in indices])
    for key in LABELS:
        name = key.removeprefix("labels/")
        known = not name.startswith("has_")
        values = [getattr(labels, name) for _, labels, _ in views] if known else [1.0] * len(views)
        made[key] = np.stack(values).astype(np.float32)
    return made


def weathered(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """As other cameras would have it, for the sake of photographs: half of all views are left as they are rendered.

    Small hands enlarged, contrast and light, faded or strong colours, sharpened edges, noise. (256,256,3).
    """
    if rng.random() < 0.5:
        return picture
    seen = picture
    if rng.random() < 0.3:
        side_px = int(np.exp(rng.uniform(np.log(28), np.log(128))))
        small = cv2.resize(seen, (side_px, side_px), interpolation=cv2.INTER_AREA)
        seen = cv2.resize(small, seen.shape[1::-1], interpolation=cv2.INTER_CUBIC if side_px % 2 else cv2.INTER_LINEAR)
    colours = seen.astype(np.float32)
    if rng.random() < 0.3:
        colours += rng.uniform(0.3, 1.2) * (colours - cv2.GaussianBlur(colours, (0, 0), rng.uniform(0.8, 2.0)))
    if rng.random() < 0.5:
        grey = colours.mean(axis=2, keepdims=True)
        colours = grey + np.float32(rng.uniform(0.2, 1.6)) * (colours - grey)
    if rng.random() < 0.3:
        channels = 1 if rng.random() < 0.5 else 3
        noise = rng.standard_normal((*seen.shape[:2], channels), np.float32)
        colours += np.float32(rng.uniform(2, 12)) * noise
    gamma, contrast, light = np.exp(rng.uniform(-0.4, 0.4)), rng.uniform(0.7, 1.3), rng.uniform(-25, 25)
    curve = ((np.arange(256) / 255) ** gamma * 255 - 128) * contrast + 128 + light
    return np.asarray(cv2.LUT(colours.clip(0, 255).astype(np.uint8), curve.clip(0, 255).astype(np.uint8)))


def _drawn(rng: np.random.Generator) -> tuple[Augmentation, BoxRule]:
    return draw_augmentation(rng), TEACHER_BOX if rng.random() < TEACHER_BOX_SHARE else STUDENT_BOX


class FreshViews(Dataset[Batch]):
    """A worker's share of every batch: each step's views are drawn anew, by its number. `trainer.lessons.Mix`."""

    def __init__(self, pictures: Pictures, held_out: Pictures, batch_size: int, group: Group) -> None:
        self.pictures, self.plain, self.batch_size, self.group = pictures, held_out, batch_size, group

    def batch(self, step: int) -> Batch:
        cv2.setNumThreads(1)
        rng = np.random.default_rng([SEEDS["train"], step, self.group.rank])
        return batch_of(self.pictures, rng.integers(len(self.pictures), size=self.batch_size // self.group.size), rng)

    __getitem__ = batch

    def batches(self, first_step: int, last_step: int, workers: int) -> Iterator[Batch]:
        """workers: processes and not threads, as half of cutting a view is Python. 0, on a CPU: no core is left."""
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": workers > 0 and torch.cuda.is_available()}
        for batch in DataLoader(self, batch_size=None, sampler=range(first_step, last_step), **options):
            yield {key: value.numpy() if isinstance(value, Tensor) else value for key, value in batch.items()}

    @property
    def validation_size(self) -> int:
        return len(self.plain)

    def validation_batches(self) -> Iterator[Batch]:
        parts = np.array_split(np.arange(len(self.plain)), -(-len(self.plain) // self.batch_size))
        for part in parts[self.group.rank :: self.group.size]:
            yield batch_of(self.plain, part)


class TellingLearner(StudentUnderTraining):
    """A network, and the layer that says what each place of a map of its own sees: 21 joints, 16 parts."""

    part: Tensor
    step: Tensor

    def __init__(self, spec: StudentSpec, recipe: StudentRecipe, hand: HandModel, channels: int) -> None:
        super().__init__(Student(spec, hand), recipe, "full", channels)
        self.seen = nn.Conv2d(channels, 21 + 16, kernel_size=1)
        nn.init.constant_(self.seen.bias, -3.0)  # most tokens see no part of the hand

        part = torch.from_numpy(hand.weights[PART_VERTICES].argmax(axis=1))
        self.register_buffer("part", part, persistent=False)
        self.register_buffer("step", torch.zeros(()))

    @property
    def share_done(self) -> float:
        return float(self.step) / self.recipe.steps

    def told(
        self, out: Tensors, batch: Tensors, map_BCHW: Tensor, targets_BJT: Tensor, seen_BPT: Tensor
    ) -> tuple[Tensor, Tensors, Tensors]:
        """What a step learns from: HaMeR's losses, the fingers', and what the map's T places should say."""
        labels = label_losses(out, {key.removeprefix("labels/"): batch[key] for key in LABELS})
        joint_scores, part_scores = self.seen(map_BCHW).flatten(2).split([21, 16], dim=1)
        missed = F.binary_cross_entropy_with_logits(part_scores, seen_BPT, reduction="none")
        told = {
            "labels": weighted(labels, self.recipe.loss),
            "labels/own_frame": own_frame_loss(out, batch),
            "token/joints": -(targets_BJT * joint_scores.log_softmax(dim=2)).sum(dim=(1, 2)) / 21,
            "token/parts": 16 * missed.mean(dim=(1, 2)),
        }
        fall = TOKEN_LOSS_WEIGHT * (1 - self.share_done)
        total = told["labels"] + OWN_FRAME_WEIGHT * told["labels/own_frame"]
        total = (total + fall * (told["token/joints"] + told["token/parts"])).mean()
        self.step += 1
        return total, {name: each.detach().mean() for name, each in told.items()}, out


class Learner(TellingLearner):
    """The teacher, some of whose tokens are left out of most steps."""

    def __init__(self, recipe: StudentRecipe, hand: HandModel, tokens: int) -> None:
        super().__init__(SPEC, recipe, hand, SIZES.embed_dim)
        self.tokens = tokens

    def losses(self, batch: Tensors, workers: int = 1) -> tuple[Tensor, Tensors, Tensors]:
        if not self.training:
            return super().losses(batch, workers)
        in_parts = self.share_done < 1 - WHOLE_AT_LAST and int(self.step) % WHOLE_EVERY
        tokens = self.tokens if in_parts else ALL_TOKENS
        vit: Vit = self.student.backbone
        seen = parts_in_tokens(batch["vertices_px"], self.part, TOKENS)
        targets = token_targets(batch[KEYPOINTS_2D][..., :2], TOKENS)
        with torch.autocast(batch[PICTURES].device.type, torch.bfloat16, enabled=self.bf16(batch[PICTURES].device)):
            x_BTC = vit.embed(normalise(batch[PICTURES]))
            if tokens < ALL_TOKENS:
                kept_B1T = kept_tokens(seen, tokens)[:, None]
                x_BTC = x_BTC.gather(1, kept_B1T.transpose(1, 2).expand(-1, -1, x_BTC.shape[2]))
                seen, targets = (each.gather(2, kept_B1T.expand(-1, each.shape[1], -1)) for each in (seen, targets))
            features_BCT1 = vit.transform(x_BTC).transpose(1, 2)[..., None].float()
        out = hands_from_features(features_BCT1, self.student.mano_head, self.student.mano, FOCAL_LENGTH_PX)
        return self.told(out, batch, features_BCT1, targets, seen)


def start_well(vit: Vit, pictures: Tensor) -> None:
    """Weights to learn from: patch filters that whiten, places as waves, attention to what is alike and near.

    The last two after Trockman and Kolter, Mimetic Initialization of Self-Attention Layers (ICML 2023). `pictures`:
    (n, 256, 256, 3) uint8.
    """
    patches = F.unfold(normalise(pictures)[..., 32:224], 16, stride=16).transpose(1, 2).reshape(-1, 768)
    values, directions = torch.linalg.eigh(torch.cov(patches.T))
    strongest = directions[:, -SIZES.embed_dim :] / (values[-SIZES.embed_dim :] + 0.05).sqrt()
    turned = torch.linalg.qr(torch.randn(SIZES.embed_dim, SIZES.embed_dim))[0] @ strongest.T
    vit.patch_embed.proj.weight.data = turned.reshape(vit.patch_embed.proj.weight.shape)
    vit.patch_embed.proj.bias.data = -turned @ patches.mean(dim=0)
    vit.pos_embed.data[0, 1:] = _waves()
    for block in vit.blocks:
        queries, keys, _ = block.attn.qkv.weight.data.chunk(3)
        alike = torch.linalg.qr(torch.randn(SIZES.embed_dim, SIZES.embed_dim))[0]
        queries.copy_(alike)
        keys.copy_(0.7 * alike)


def _waves() -> Tensor:
    """(192, C): sines and cosines of a token's row and column at many wavelengths."""
    row = torch.arange(16.0).repeat_interleave(12)[:, None]
    column = torch.arange(12.0).repeat(16)[:, None]
    quarter = SIZES.embed_dim // 4
    rates = 1.5 * 0.1 ** (torch.arange(quarter) / quarter)
    quarter_turn = torch.pi / 2 / rates  # makes sines of cosines
    return torch.cat([(place * rates).sin() for place in (row, column, row + quarter_turn, column + quarter_turn)], 1)


def token_targets(keypoints_B212: Tensor, places: Places) -> Tensor:
    """(B, 21, T): each joint shared among the four places around it; nothing where it lies outside them."""
    pixels, middle_px = (keypoints_B212 + 0.5) * 256, (places.side_px - 1) / 2
    column = (pixels[..., 0] - places.left_px - middle_px) / places.side_px
    row = (pixels[..., 1] - places.top_px - middle_px) / places.side_px
    columns = torch.arange(places.columns, device=pixels.device)
    rows = torch.arange(places.rows, device=pixels.device)
    across = (1 - (column[..., None] - columns).abs()).clamp(min=0)
    down = (1 - (row[..., None] - rows).abs()).clamp(min=0)
    return (down[..., :, None] * across[..., None, :]).flatten(2)


def own_frame_loss(out: Mapping[str, Tensor], batch: Tensors) -> Tensor:
    """(B,): by how much the joints are missed in the wrist's own frame, metres, summed over 21 x 3 coordinates.

    What HaMeR's loss of joints says is mostly in which direction the hand points. Here each hand is turned back by its
    own direction, the answer by the answered one, and what is left are the fingers and the shape.
    """
    true_B214 = batch[KEYPOINTS_3D]
    own_true = true_B214[..., :3] @ rotations(batch["labels/global_orient"])[:, 0]
    own_said = out["keypoints_3d"] @ out["global_orient"][:, 0]
    return points_3d(own_said, own_true, true_B214[..., 3:])


def parts_in_tokens(vertices_BV2: Tensor, part_V: Tensor, places: Places) -> Tensor:
    """(B, 16, T): 1 where the place holds vertices of the part, hidden ones too. vertices_BV2: crop px."""
    device, count = vertices_BV2.device, places.rows * places.columns
    corner = torch.tensor([places.left_px, places.top_px], device=device)
    tokens = ((vertices_BV2 - corner) / places.side_px).floor().long()
    inside = ((tokens >= 0) & (tokens < torch.tensor([places.columns, places.rows], device=device))).all(dim=2)
    place = tokens[..., 1] * places.columns + tokens[..., 0]
    seen = torch.zeros(len(vertices_BV2), 16 * count + 1, device=device)
    seen.scatter_(1, torch.where(inside, part_V * count + place, 16 * count), 1.0)  # the last place is thrown away
    return seen[:, :-1].view(-1, 16, count)


def kept_tokens(seen_BPT: Tensor, count: int) -> Tensor:
    """(B, count): tokens drawn without replacement, those that hold parts of the hand more readily than others."""
    readiness = 1 + (HAND_TOKENS_FIRST - 1) * seen_BPT.amax(dim=1)
    # Whoever waits least, at these rates, is drawn first (Efraimidis and Spirakis, 2006).
    return (torch.empty_like(readiness).exponential_() / readiness).topk(count, dim=1, largest=False).indices


@torch.no_grad()
def evaluate(student: Student, pictures: Pictures) -> dict[str, float]:
    """Errors on the set's plain crops, in millimetres; proper rotations only."""
    student.eval()
    found, true = [], []
    device = next(student.parameters()).device
    for indices in np.array_split(np.arange(len(pictures)), -(-len(pictures) // BATCH["cpu"])):
        batch = batch_of(pictures, indices)
        images = normalise(torch.from_numpy(batch[PICTURES]).to(device))
        found.append(student(images)["keypoints_3d"].cpu().numpy())
        true.append(batch["labels/keypoints_3d"][..., :3])
    student.train()
    joints, truth = np.concatenate(found).astype(np.float64), np.concatenate(true).astype(np.float64)
    aligned = pa_mpjpe_mm(joints, truth, reflection=False)
    rooted = mpjpe_mm(joints - joints[:, :1], truth - truth[:, :1])
    return {"pa_mpjpe_mm": float(aligned.mean()), "mpjpe_mm": float(rooted.mean())}


def mean_pose_error(hand: HandModel, pictures: Pictures) -> float:
    """PA-MPJPE in millimetres of answering the mean hand in the mean pose to every picture."""
    pose = rotation_matrices(np.concatenate([np.zeros(3), hand.hands_mean]).reshape(16, 3))
    joints = pose_hand(hand, pose, np.zeros(10))[1]
    truth = np.stack([pictures.view(i)[1].keypoints_3d[:, :3] for i in range(len(pictures))])
    return float(pa_mpjpe_mm(np.tile(joints, (len(truth), 1, 1)), truth.astype(np.float64), reflection=False).mean())


def first_views(pictures: Pictures) -> Tensor:
    """Some plain crops, in which the hands have to be as large as they are cut out."""
    batch = batch_of(pictures, np.arange(min(200, len(pictures))))
    joints = batch[KEYPOINTS_2D][..., :2]
    longer_side = float(np.median(np.ptp(joints, axis=1).max(axis=1)))
    assert 0.2 < longer_side < 1, f"a hand takes {longer_side:.3f} of its crop: in which unit is the box?"
    return torch.from_numpy(batch[PICTURES])


class Prints(Silent):
    """What a training says, in lines."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = ("loss", "labels", "labels/own_frame", "token/joints", "token/parts", "pictures_per_s")
        print(f"step {step}", *(f"{name} {metrics[name]:.3f}" for name in shown), flush=True)

    def on_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        print(f"step {step}: held out PA {metrics['pa_mpjpe_mm']:.2f} mm, loss {metrics['loss']:.3f}", flush=True)


@dataclass(frozen=True)
class Course:
    """A training."""

    job: Callable[[argparse.Namespace], TrainJob]
    learner: Callable[[TrainJob, argparse.Namespace, Tensor], TellingLearner]
    """Of the job, the arguments, and some plain crops (n, 256, 256, 3) uint8."""
    export: Callable[[Student, Path], None]


def run(arguments: argparse.Namespace, course: Course) -> None:
    """Train, in as many processes as the arguments say, or export the best so far; render what is not there yet."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    held_out = render(arguments.folder, 0, "held-out", HELD_OUT)
    if arguments.export is not None:
        student = Student.load(best_so_far(arguments.folder, course.job(arguments).name))
        course.export(student, arguments.export)
        print(evaluate(student, held_out), "mean pose", mean_pose_error(student.hand_model, held_out))
        return
    render_all(arguments.folder, chunks_of(arguments))
    if arguments.device == "cuda":
        arguments.processes = 1
    torch.multiprocessing.spawn(train_rank, (arguments, course), nprocs=arguments.processes)


def train_rank(rank: int, arguments: argparse.Namespace, course: Course) -> None:
    """One of the processes, each with its share of every batch."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.processes))
    meeting = f"file://{(arguments.folder / f'meeting-{os.getppid()}').absolute()}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=arguments.processes)
    pictures = together([render(arguments.folder, chunk) for chunk in chunks_of(arguments)])
    held_out = render(arguments.folder, 0, "held-out", HELD_OUT)
    lessons = partial(lessons_on, course, pictures, held_out, arguments)
    train(course.job(arguments), Prints(), Group.joined(), lessons=lessons)
    distributed.destroy_process_group()


def lessons_on(
    course: Course,
    pictures: Pictures,
    held_out: Pictures,
    arguments: argparse.Namespace,
    job: TrainJob,
    group: Group,
) -> Lessons:
    """What the trainer's loop learns from."""
    learner = partial(course.learner, job, arguments, first_views(pictures))
    return Lessons(FreshViews(pictures, held_out, job.recipe.batch_size, group), learner)


def learner_of(job: TrainJob, arguments: argparse.Namespace, crops: Tensor) -> Learner:
    """The teacher, from fresh weights or from those of another."""
    made = Learner(job.recipe, load_hand_model(OPEN_HAND), arguments.tokens)
    if arguments.start_from is None:
        start_well(made.student.backbone, crops)
    else:
        known = {name: each.float() for name, each in read_checkpoint(arguments.start_from).items()}
        made.student.load_state_dict(made.student.state_dict() | known)
    return made


def job_of(arguments: argparse.Namespace) -> TrainJob:
    """The teacher's training."""
    start = None if arguments.start_from is None else sha256_bytes(arguments.start_from.read_bytes())
    weights = [OWN_FRAME_WEIGHT, TOKEN_LOSS_WEIGHT, HAND_TOKENS_FIRST, WHOLE_EVERY, WHOLE_AT_LAST]
    decides = {"start": start, "tokens": arguments.tokens, "told": weights}
    return named_job("demo-teacher", RECIPE, BATCH, arguments, decides)


TEACHER = Course(job_of, learner_of, export_hamer_checkpoint)


def named_job(
    name: str,
    keys: Mapping[str, Any],
    batch: Mapping[str, int],
    arguments: argparse.Namespace,
    decides: Mapping[str, Any],
) -> TrainJob:
    """A training, in a folder of FOLDER that is named after all that decides its weights, `decides` besides."""
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    given = {
        "steps": arguments.steps,
        "batch_size": batch[device.type],
        "precision": "bf16" if has_bfloat16(device) else "fp32",
        "loader_workers": (os.cpu_count() or 1) if on_gpu else 0,
    }
    recipe = StudentRecipe.model_validate({**keys, **given})
    chunks = chunks_of(arguments)
    what = recipe.identity() | decides | {"chunks": [chunks.start, chunks.stop]}
    identity = sha256_bytes(canonical_json(what))
    return TrainJob(
        name=name,
        seed=0,
        recipe=recipe,
        snapshots=(),
        hand_model=None,
        out_dir=arguments.folder / f"{name}-{identity[:8]}",
        identity=identity,
        device=arguments.device,
    )


def best_so_far(folder: Path, name: str) -> Path:
    """The best network of the training of that name that wrote last."""
    found = [each for kept in (STUDENT, "best-*") for each in folder.glob(f"{name}-*/{kept}/student.json")]
    if not found:
        raise SystemExit(f"{folder}: no {name} was trained here yet (a network is kept after every validation)")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def parser_of(document: str, batch: Mapping[str, int]) -> argparse.ArgumentParser:
    """What every training here can be told."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=40000)
    parser.add_argument("--skip-pictures", type=int, default=0, help="so many that others were trained on")
    steps = "of {cpu} pictures on a CPU, {cuda} on a GPU".format_map(batch)
    parser.add_argument("--steps", type=int, default=15000, help=steps)
    parser.add_argument("--device", choices=batch, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="on a CPU: of one thread, share a batch")
    parser.add_argument("--export", type=Path, help="write the best network so far here instead of training")
    return parser


def parsed(line: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, BATCH)
    parser.add_argument("--tokens", type=int, default=ALL_TOKENS, help="of 192, that most steps look at")
    parser.add_argument("--start-from", type=Path, help="a hamer.ckpt of these sizes, to train further")
    return parser.parse_args(line)


if __name__ == "__main__":
    run(parsed(), TEACHER)
