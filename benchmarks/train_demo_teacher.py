"""Train the small teacher of the demo on synthesised hands, and write it as a checkpoint in HaMeR's layout.

    python benchmarks/train_demo_teacher.py FOLDER [--pictures 40000] [--minutes 480]
    python benchmarks/train_demo_teacher.py FOLDER --export models/assets/demo_teacher

Renders the training pictures into FOLDER first (about eleven minutes on two cores), then trains for the minutes given,
counted over all starts: stopped and started again it goes on from its last checkpoint. `--export` writes the best
network so far, `--start-from models/assets/demo_teacher/checkpoints/hamer.ckpt` trains the one in the package further.

A vision transformer learns slowly from few pictures. So it starts with filters that whiten patches and with attention
to neighbours, and while it trains each token also says which joints and which parts of the hand it sees; the layer that
says so is left out of the checkpoint.

On a GPU one process trains and one a core prepares its batches. On a CPU it is one process of one thread a core: 64 to
80 pictures a second on two cores with bfloat16 products, 10 on two old ones without. Products are in
bfloat16 where the machine has them; where a CPU has to imitate them they are twenty times as slow as in float32.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from timm.utils.model_ema import ModelEmaV3
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
from models.hand_model import HandModel, load_hand_model
from models.preprocessing import FOCAL_LENGTH_PX, normalise
from models.sizes import DecoderSizes, VitSizes
from models.student import Student, StudentSpec, export_hamer_checkpoint
from models.vit import Vit
from stages.config import HamerNpzDataset, SynthesiseConfig, SynthesiseSet
from stages.skinning import pose_hand, rotation_matrices
from stages.synthesise import run_unit, synthesise_units, unit_done
from trainer.config import LossWeights
from trainer.losses import label_losses, weighted
from trainer.metrics import mpjpe_mm, pa_mpjpe_mm

SIZES = VitSizes(embed_dim=192, depth=8, num_heads=3)
SPEC = StudentSpec(
    backbone="hamer",
    vit=SIZES,
    decoder=DecoderSizes(dim=192, depth=2, heads=6, dim_head=32, mlp_dim=384),
)
BATCH = {"cpu": 64, "cuda": 256}
"""Of all processes together, by the kind of device."""
LR_MATRICES, LR_OTHERS, WARMUP_STEPS, WEIGHT_DECAY = 1.5e-3, 1e-3, 200, 0.05
FALL = 0.3
"""The last share of the time, in which the learning rate falls to nothing; before that it stays, so that a run can be
prolonged."""
AVERAGED = 0.999
WEIGHTS = LossWeights(keypoints_3d=0.15, keypoints_2d=0.03, global_orient=0.02, hand_pose=0.02, betas=0.0005)
TOKEN_LOSS_WEIGHT = 0.3
LOSSES = ("total", "labels", "joints", "parts")
CHECK_EVERY_STEPS = 250
CHUNK, HELD_OUT = 1000, 500
SEEDS = {"train": 1000, "held-out": 2000}
"""Apart from those of the sets that pipeline.yaml synthesises: the demo must not meet its teacher's pictures."""
TEACHER_BOX_SHARE = 0.35
"""Of views cut as HaMeR is evaluated, with a wider box than it is trained with."""
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


def render_all(folder: Path, pictures: int) -> None:
    """Every file, a process a core."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for _ in pool.imap_unordered(partial(_render_quietly, folder), range(-(-pictures // CHUNK))):
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


def batch_of(
    pictures: Pictures, indices: NDArray[np.int64], rng: np.random.Generator | None = None
) -> dict[str, Tensor]:
    """Pictures and labels of a batch; without a generator the plain crops."""
    plans = [(IDENTITY, STUDENT_BOX) if rng is None else _drawn(rng) for _ in indices]
    views = [pictures.view(int(i), *plan) for i, plan in zip(indices, plans, strict=True)]
    made = {"pictures": torch.from_numpy(np.stack([picture for picture, _, _ in views]))}
    made["vertices_px"] = torch.from_numpy(np.stack([vertices for _, _, vertices in views]))
    for name in ("keypoints_2d", "keypoints_3d", "global_orient", "hand_pose", "betas"):
        made[name] = torch.from_numpy(np.stack([getattr(labels, name) for _, labels, _ in views]).astype(np.float32))
    ones = torch.ones(len(views))
    return made | {"has_hand_pose": ones, "has_betas": ones}


def _drawn(rng: np.random.Generator) -> tuple[Augmentation, BoxRule]:
    return draw_augmentation(rng), TEACHER_BOX if rng.random() < TEACHER_BOX_SHARE else STUDENT_BOX


class Batches(Dataset[dict[str, Tensor]]):
    """A process's share of the batch of each step, by the step's number: the same whoever prepares it."""

    def __init__(self, pictures: Pictures, share: int, rank: int) -> None:
        self.pictures, self.share, self.rank = pictures, share, rank

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        cv2.setNumThreads(1)
        rng = np.random.default_rng([SEEDS["train"], step, self.rank])
        return batch_of(self.pictures, rng.integers(len(self.pictures), size=self.share), rng)

    def from_step(self, step: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """Batches on the device, without end. On a CPU the training process makes its own: it has no core to spare."""
        workers = os.cpu_count() or 1 if device.type == "cuda" else 0
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": workers > 0}
        for batch in DataLoader(self, batch_size=None, sampler=range(step, 1 << 31), **options):
            yield to_device(batch, device)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: values.to(device, non_blocking=True) for name, values in batch.items()}


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


class Learner(nn.Module):
    """The network, and the layer that says what each token sees: 21 joints, 16 parts."""

    part: Tensor

    def __init__(self, hand: HandModel, bfloat16: bool) -> None:
        super().__init__()
        self.bfloat16 = bfloat16
        self.student = Student(SPEC, hand)
        self.seen = nn.Conv2d(SIZES.embed_dim, 21 + 16, kernel_size=1)
        nn.init.constant_(self.seen.bias, -3.0)  # most tokens see no part of the hand

        part = torch.from_numpy(hand.weights[PART_VERTICES].argmax(axis=1))
        self.register_buffer("part", part, persistent=False)

    def loss(self, batch: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
        """rate: the learning rate's share of its highest; the tokens' loss falls with it."""
        with torch.autocast(batch["pictures"].device.type, torch.bfloat16, enabled=self.bfloat16):
            features = self.student.backbone(normalise(batch["pictures"]))
        features = features.float()
        out = hands_from_features(features, self.student.mano_head, self.student.mano, FOCAL_LENGTH_PX)
        joint_scores, part_scores = self.seen(features).flatten(2).split([21, 16], dim=1)
        targets = token_targets(batch["keypoints_2d"][..., :2])
        joints = -(targets * joint_scores.log_softmax(dim=2)).sum(dim=(1, 2)) / 21
        seen = parts_in_tokens(batch["vertices_px"], self.part)
        parts = 16 * F.binary_cross_entropy_with_logits(part_scores, seen, reduction="none").mean(dim=(1, 2))
        labels = weighted(label_losses(out, batch), WEIGHTS)
        total = labels + TOKEN_LOSS_WEIGHT * rate * (joints + parts)
        return {name: each.mean() for name, each in zip(LOSSES, (total, labels, joints, parts), strict=True)}


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


def token_targets(keypoints_B212: Tensor) -> Tensor:
    """(B, 21, 192): each joint shared among the four tokens around it; nothing where it lies outside the tokens."""
    # Token (row, column) covers rows 16 row - 2 .. 16 row + 13, columns 32 further: the embedding pads by two.
    pixels = (keypoints_B212 + 0.5) * 256
    column, row = (pixels[..., 0] - 32 - 5.5) / 16, (pixels[..., 1] - 5.5) / 16
    columns, rows = torch.arange(12, device=pixels.device), torch.arange(16, device=pixels.device)
    across = (1 - (column[..., None] - columns).abs()).clamp(min=0)
    down = (1 - (row[..., None] - rows).abs()).clamp(min=0)
    return (down[..., :, None] * across[..., None, :]).flatten(2)


def parts_in_tokens(vertices_BV2: Tensor, part_V: Tensor) -> Tensor:
    """(B, 16, 192): 1 where the token holds vertices of the part, hidden ones too. vertices_BV2: crop px."""
    device = vertices_BV2.device
    tokens = ((vertices_BV2 - torch.tensor([32.0, 0.0], device=device) + 2) / 16).floor().long()
    inside = ((tokens >= 0) & (tokens < torch.tensor([12, 16], device=device))).all(dim=2)
    place = tokens[..., 1] * 12 + tokens[..., 0]
    seen = torch.zeros(len(vertices_BV2), 16 * 192 + 1, device=device)
    seen.scatter_(1, torch.where(inside, part_V * 192 + place, 16 * 192), 1.0)  # the last place is thrown away
    return seen[:, :-1].view(-1, 16, 192)


@torch.no_grad()
def evaluate(student: Student, pictures: Pictures) -> dict[str, float]:
    """Errors on the set's plain crops, in millimetres; proper rotations only."""
    student.eval()
    found, true = [], []
    device = next(student.parameters()).device
    for indices in np.array_split(np.arange(len(pictures)), -(-len(pictures) // BATCH["cpu"])):
        batch = batch_of(pictures, indices)
        found.append(student(normalise(batch["pictures"].to(device)))["keypoints_3d"].cpu().numpy())
        true.append(batch["keypoints_3d"][..., :3].numpy())
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


def rate_at(step: int, share_done: float) -> float:
    """Share of the highest learning rate: warm-up by steps, then all of it, then a fall by the share of the time."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, max(0.0, 1 - share_done) / FALL)


def orthogonal(gradient: Tensor, coefficients: tuple[float, float, float], steps: int, smallest_norm: float) -> Tensor:
    """Muon's iteration in the gradient's own precision. torch's is in bfloat16, and took more than half of a step where
    a CPU imitates that."""
    a, b, c = coefficients
    turned = gradient.size(0) > gradient.size(1)
    matrix = gradient.T if turned else gradient
    matrix = matrix / matrix.norm().clamp(min=smallest_norm)
    for _ in range(steps):
        gram = matrix @ matrix.T
        matrix = torch.addmm(matrix, torch.addmm(gram, gram, gram, beta=b, alpha=c), matrix, beta=a)
    return matrix.T if turned else matrix


def optimizers_for(learner: Learner) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between layers, as its authors use it; AdamW for the rest."""
    if not learner.bfloat16:
        torch.optim._muon._zeropower_via_newtonschulz = orthogonal
    within = [*learner.student.backbone.blocks.parameters(), *learner.student.mano_head.transformer.parameters()]
    matrices = {id(parameter) for parameter in within if parameter.ndim == 2}
    between = [parameter for parameter in learner.parameters() if id(parameter) in matrices]
    rest = [parameter for parameter in learner.parameters() if id(parameter) not in matrices]
    return [
        torch.optim.Muon(between, lr=LR_MATRICES, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LR_OTHERS, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.99)),
    ]


class Run:
    """A training run in a folder: it goes on from where the last one there stopped."""

    def __init__(
        self,
        folder: Path,
        minutes: float,
        pictures: Pictures,
        held_out: Pictures,
        hand: HandModel,
        device: torch.device,
    ) -> None:
        torch.manual_seed(0)
        self.folder, self.budget_s, self.pictures, self.held_out = folder, minutes * 60, pictures, held_out
        self.device = device
        self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()
        self.learner = Learner(hand, has_bfloat16(device))
        self.optimizers = optimizers_for(self.learner)
        self.step, self.spent_s, self.best = 0, 0.0, float("inf")
        self.mean_pose_mm = mean_pose_error(hand, held_out)

    def resume_or_start(self, start_from: Path | None) -> None:
        checkpoint = self.folder / "checkpoint.pt"
        if checkpoint.exists():
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            self.learner.load_state_dict(state["learner"])
            self.step, self.spent_s, self.best = state["step"], state["spent_s"], state["best"]
        elif start_from is not None:
            known = self.learner.student.state_dict()
            known.update({name: value.float() for name, value in read_checkpoint(start_from).items()})
            self.learner.student.load_state_dict(known)
        else:
            start_well(self.learner.student.backbone, self.first_views())
        self.learner.to(self.device)
        self.average = ModelEmaV3(self.learner, AVERAGED, use_warmup=True)
        if checkpoint.exists():
            self.average.module.load_state_dict(state["average"])
            for optimizer, its_state in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(its_state)

    def first_views(self) -> Tensor:
        """Some plain crops, in which the hands have to be as large as they are cut out."""
        batch = batch_of(self.pictures, np.arange(min(200, len(self.pictures))))
        joints = batch["keypoints_2d"][..., :2]
        longer_side = (joints.amax(dim=1) - joints.amin(dim=1)).amax(dim=1).median()
        assert 0.2 < longer_side < 1, f"a hand takes {longer_side:.3f} of its crop: in which unit is the box?"
        return batch["pictures"]

    def train(self) -> None:
        last = time.monotonic()
        share = BATCH[self.device.type] // self.ranks
        for batch in Batches(self.pictures, share, self.rank).from_step(self.step, self.device):
            if self.spent_s >= self.budget_s:
                break
            losses = self.one_step(batch)
            self.spent_s = self.agreed(self.spent_s + time.monotonic() - last)
            last = time.monotonic()
            if self.step % 50 == 0 and self.rank == 0:
                shown = " ".join(f"{name} {float(value.detach()):.4f}" for name, value in losses.items())
                print(f"step {self.step} min {self.spent_s / 60:.1f} {shown}", flush=True)
            if self.rank == 0 and (self.step % CHECK_EVERY_STEPS == 0 or self.spent_s >= self.budget_s):
                self.check()

    def agreed(self, value: float) -> float:
        """The first process's: all must take the same decisions."""
        told = torch.tensor([value], dtype=torch.float64)
        distributed.broadcast(told, 0)
        return float(told)

    def one_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        rate = rate_at(self.step, self.spent_s / self.budget_s)
        losses = self.learner.loss(batch, rate)
        for optimizer, highest in zip(self.optimizers, (LR_MATRICES, LR_OTHERS), strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = highest * rate
        losses["total"].backward()  # type: ignore[no-untyped-call]  # torch types it not
        self.share_gradients()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.average.update(self.learner, self.step)
        return losses

    def share_gradients(self) -> None:
        """The mean over the processes, in one message."""
        if self.ranks == 1:
            return
        gradients = [parameter.grad for parameter in self.learner.parameters() if parameter.grad is not None]
        message = nn.utils.parameters_to_vector(gradients)
        distributed.all_reduce(message)
        nn.utils.vector_to_parameters(message / self.ranks, gradients)

    def check(self) -> None:
        """Score the averaged network, keep it if it is the best so far, and write the checkpoint."""
        averaged: Learner = self.average.module
        found = evaluate(averaged.student, self.held_out)
        errors = f"PA {found['pa_mpjpe_mm']:.2f} mm, from the wrist {found['mpjpe_mm']:.1f} mm"
        print(f"step {self.step}: held out {errors}; mean pose PA {self.mean_pose_mm:.2f} mm", flush=True)
        if found["pa_mpjpe_mm"] < self.best:
            self.best = found["pa_mpjpe_mm"]
            averaged.student.save(self.folder / "best")
        saved = {"learner": self.learner.state_dict(), "average": averaged.state_dict()}
        saved |= {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        saved |= {"step": self.step, "spent_s": self.spent_s, "best": self.best}
        torch.save(saved, self.folder / "checkpoint.partial")
        (self.folder / "checkpoint.partial").replace(self.folder / "checkpoint.pt")


def train_rank(rank: int, arguments: argparse.Namespace) -> None:
    """One of the processes, each with its share of every batch."""
    torch.set_num_threads(1)
    meeting = f"file://{(arguments.folder / f'meeting-{os.getppid()}').absolute()}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=arguments.processes)
    chunks = range(-(-arguments.pictures // CHUNK))
    pictures = together([render(arguments.folder, chunk) for chunk in chunks])
    held_out = render(arguments.folder, 0, "held-out", HELD_OUT)
    device, hand = torch.device(arguments.device), load_hand_model("open-hand")
    run = Run(arguments.folder, arguments.minutes, pictures, held_out, hand, device)
    run.resume_or_start(arguments.start_from)
    run.train()
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=40000)
    parser.add_argument("--minutes", type=float, default=480)
    parser.add_argument("--device", choices=BATCH, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="on a CPU: of one thread, share a batch")
    parser.add_argument("--start-from", type=Path, help="a hamer.ckpt of these sizes, to train further")
    parser.add_argument("--export", type=Path, help="write the best network so far here instead of training")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    held_out = render(arguments.folder, 0, "held-out", HELD_OUT)
    if arguments.export is not None:
        student = Student.load(arguments.folder / "best")
        export_hamer_checkpoint(student, arguments.export)
        print(evaluate(student, held_out), "mean pose", mean_pose_error(student.hand_model, held_out))
        return
    render_all(arguments.folder, arguments.pictures)
    if arguments.device == "cuda":
        arguments.processes = 1
    torch.multiprocessing.spawn(train_rank, (arguments,), nprocs=arguments.processes)


if __name__ == "__main__":
    main()
