"""Train the small teacher of the demo on synthesised hands, and write it as a checkpoint in HaMeR's layout.

    python benchmarks/train_demo_teacher.py FOLDER [--pictures 12000] [--minutes 80]
    python benchmarks/train_demo_teacher.py FOLDER --export models/assets/demo_teacher

Renders the training pictures into FOLDER first (ten minutes or so), then trains for the minutes given, counted over all
starts: stopped and started again it goes on from its last checkpoint. `--export` writes the best network so far,
`--start-from models/assets/demo_teacher/checkpoints/hamer.ckpt` trains the one in the package further.

A vision transformer learns slowly from few pictures. So it starts with filters that whiten patches and with attention
to neighbours, and while it trains each token also says which joints and which parts of the hand it sees; the layer that
says so is left out of the checkpoint.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from models.checkpoint import read_checkpoint
from models.crops import IDENTITY, Augmentation, HandLabels, crop, draw_augmentation, move_labels, square_box_px
from models.hand_model import HandModel, load_hand_model
from models.preprocessing import normalise
from models.sizes import DecoderSizes, VitSizes
from models.student import Student, StudentSpec, export_hamer_checkpoint
from models.vit import Vit
from stages.config import HamerNpzDataset, SynthesiseConfig, SynthesiseSet
from stages.skinning import Floats, pose_hand, rotation_matrices
from stages.synthesise import run_unit, synthesise_units, unit_done
from trainer.config import LossWeights
from trainer.losses import label_losses, weighted
from trainer.metrics import mpjpe_mm, pa_mpjpe_mm

SIZES = VitSizes(embed_dim=192, depth=6, num_heads=6)
SPEC = StudentSpec(
    backbone="hamer",
    vit=SIZES,
    decoder=DecoderSizes(dim=192, depth=2, heads=6, dim_head=32, mlp_dim=384),
)
BATCH = 8
LR, WARMUP_STEPS, WEIGHT_DECAY = 7e-4, 200, 0.02
WEIGHTS = LossWeights(keypoints_3d=0.05, keypoints_2d=0.03, global_orient=0.02, hand_pose=0.02, betas=0.0005)
TOKEN_LOSS_WEIGHT = 0.3
"""At the start; it falls linearly to nothing: where to look comes first, what to say of it last."""
LOSSES = ("total", "labels", "joints", "parts")
CHECK_EVERY_STEPS = 500
HELD_OUT = 400
SEEDS = {"train": 1000, "held-out": 2000}
"""Apart from those of the sets that pipeline.yaml synthesises: the demo must not meet its teacher's pictures."""


@dataclass(frozen=True)
class Pictures:
    """A synthesised set in memory: encoded pictures, labels in the picture's frame."""

    files: list[Path]
    arrays: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.files)

    def row(self, index: int) -> dict[str, Any]:
        """The npz's entries of one hand."""
        return {name: values[index] for name, values in self.arrays.items()}

    def view(self, index: int, augmentation: Augmentation) -> tuple[NDArray[np.uint8], HandLabels, Floats]:
        """The 256 x 256 crop and its labels, as HaMeR's training makes them, and the affine from picture to crop."""
        image = np.asarray(Image.open(self.files[index]).convert("RGB"))
        row = self.row(index)
        pose, betas = row["hand_pose"].astype(np.float32), row["betas"].astype(np.float32)
        labels = HandLabels(row["hand_keypoints_2d"], row["hand_keypoints_3d"], pose[:3], pose[3:], betas)
        cut = crop(image, row["center"], square_box_px(row["scale"] / 200), bool(row["right"]), augmentation)
        return cut.picture, move_labels(labels, cut, augmentation), cut.affine


def synthesised(folder: Path, name: str, hands: int) -> Pictures:
    """The set, rendered if it is not there yet."""
    dataset = HamerNpzDataset(format="hamer_npz", path=f"{name}/hands.npz", image_dir=f"{name}/rgb")
    config = SynthesiseConfig(sets={name: SynthesiseSet(hands=hands, seed=SEEDS[name])})
    for unit in synthesise_units(config, {name: dataset}, folder):
        if not unit_done(unit):
            run_unit(unit)
    with np.load(folder / name / "hands.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    return Pictures([folder / name / "rgb" / str(file) for file in arrays["imgname"]], arrays)


class Parts:
    """Which parts of the hand lie where, from a picture's labels."""

    def __init__(self, hand: HandModel) -> None:
        self._hand = hand
        self._part = hand.weights.argmax(axis=1)

    def in_tokens(self, row: dict[str, Any], affine: Floats) -> NDArray[np.float32]:
        """(16, 192): 1 where the crop's token holds vertices of the part, hidden ones too."""
        mirror = np.array([1, 1, 1]) if row["right"] else np.array([-1, 1, 1])
        pose = row["hand_pose"].reshape(16, 3) * (mirror if row["right"] else [1, -1, -1])
        vertices, joints = pose_hand(self._hand, rotation_matrices(pose), row["betas"])
        truth = row["hand_keypoints_3d"][:, :3]
        points = (vertices - joints[0]) * mirror + truth[0]
        camera = np.stack([truth[:, 0] / truth[:, 2], np.ones(21)], axis=1)
        focal_px, centre_px = np.linalg.lstsq(camera, row["hand_keypoints_2d"][:, 0], rcond=None)[0]
        pixels = np.column_stack([points[:, :2] / points[:, 2:] * focal_px + centre_px, np.ones(len(points))])
        crop_px = pixels @ affine.T
        tokens = np.floor((crop_px - [32, 0] + 2) / 16).astype(np.int64)
        inside = ((tokens >= 0) & (tokens < [12, 16])).all(axis=1)
        seen = np.zeros((16, 192), dtype=np.float32)
        seen[self._part[inside], tokens[inside, 1] * 12 + tokens[inside, 0]] = 1
        return seen


def batch_of(
    pictures: Pictures, indices: NDArray[np.int64], rng: np.random.Generator | None, parts: Parts | None = None
) -> dict[str, Tensor]:
    """Pictures and labels of a batch; without a generator the plain crops."""
    # The pictures show hands at all angles already: turned ones would only be harder to look at.
    drawn = [IDENTITY if rng is None else replace(draw_augmentation(rng), rotation_deg=0.0) for _ in indices]
    views = [pictures.view(int(i), augmentation) for i, augmentation in zip(indices, drawn, strict=True)]
    made = {"pictures": torch.from_numpy(np.stack([picture for picture, _, _ in views]))}
    if parts is not None:
        seen = [parts.in_tokens(pictures.row(int(i)), view[2]) for i, view in zip(indices, views, strict=True)]
        made["parts"] = torch.from_numpy(np.stack(seen))
    for name in ("keypoints_2d", "keypoints_3d", "global_orient", "hand_pose", "betas"):
        made[name] = torch.from_numpy(np.stack([getattr(labels, name) for _, labels, _ in views]).astype(np.float32))
    ones = torch.ones(len(views))
    return made | {"has_hand_pose": ones, "has_betas": ones}


class Learner(nn.Module):
    """The network, and the layer that says what each token sees: 21 joints, 16 parts."""

    def __init__(self, hand: HandModel) -> None:
        super().__init__()
        self.student = Student(SPEC, hand)
        self.seen = nn.Conv2d(SIZES.embed_dim, 21 + 16, kernel_size=1)
        nn.init.constant_(self.seen.bias, -3.0)  # most tokens see no part of the hand

    def loss(self, batch: dict[str, Tensor], share_done: float) -> dict[str, Tensor]:
        out = self.student(normalise(batch["pictures"]))
        joint_scores, part_scores = self.seen(out["features"]).flatten(2).split([21, 16], dim=1)
        targets = token_targets(batch["keypoints_2d"][..., :2])
        joints = -(targets * joint_scores.log_softmax(dim=2)).sum(dim=(1, 2)) / 21
        parts = 16 * F.binary_cross_entropy_with_logits(part_scores, batch["parts"], reduction="none").mean(dim=(1, 2))
        labels = weighted(label_losses(out, batch), WEIGHTS)
        total = labels + TOKEN_LOSS_WEIGHT * max(0.0, 1 - share_done) * (joints + parts)
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
    across = (1 - (column[..., None] - torch.arange(12)).abs()).clamp(min=0)
    down = (1 - (row[..., None] - torch.arange(16)).abs()).clamp(min=0)
    return (down[..., :, None] * across[..., None, :]).flatten(2)


@torch.no_grad()
def evaluate(student: Student, pictures: Pictures) -> dict[str, float]:
    """Errors on the set's plain crops, in millimetres; proper rotations only."""
    student.eval()
    found, true = [], []
    for start in range(0, len(pictures), BATCH):
        batch = batch_of(pictures, np.arange(start, min(start + BATCH, len(pictures))), None)
        found.append(student(normalise(batch["pictures"]))["keypoints_3d"].numpy())
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
    truth = np.stack([pictures.view(i, IDENTITY)[1].keypoints_3d[:, :3] for i in range(len(pictures))])
    return float(pa_mpjpe_mm(np.tile(joints, (len(truth), 1, 1)), truth.astype(np.float64), reflection=False).mean())


def learning_rate(step: int, share_done: float) -> float:
    """Warm-up by steps, then a cosine by the share of the time that is over."""
    return LR * min(1.0, (step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * float(np.cos(np.pi * min(share_done, 1.0))))


class Run:
    """A training run in a folder: it goes on from where the last one there stopped."""

    def __init__(self, folder: Path, minutes: float, pictures: Pictures, held_out: Pictures, hand: HandModel) -> None:
        torch.manual_seed(0)
        self.folder, self.budget_s, self.pictures, self.held_out = folder, minutes * 60, pictures, held_out
        self.learner, self.parts = Learner(hand), Parts(hand)
        self.optimizer = torch.optim.AdamW(self.learner.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        self.step, self.spent_s, self.best = 0, 0.0, float("inf")
        self.mean_pose_mm = mean_pose_error(hand, held_out)

    def resume_or_start(self, start_from: Path | None) -> None:
        checkpoint = self.folder / "checkpoint.pt"
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            self.learner.load_state_dict(state["learner"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.spent_s, self.best = state["step"], state["spent_s"], state["best"]
        elif start_from is not None:
            known = self.learner.student.state_dict()
            known.update({name: value.float() for name, value in read_checkpoint(start_from).items()})
            self.learner.student.load_state_dict(known)
        else:
            seen = batch_of(self.pictures, np.arange(min(200, len(self.pictures))), None)["pictures"]
            start_well(self.learner.student.backbone, seen)

    def train(self) -> None:
        last = time.monotonic()
        while self.spent_s < self.budget_s:
            losses = self.one_step()
            now = time.monotonic()
            self.spent_s, last = self.spent_s + now - last, now
            if self.step % 100 == 0:
                shown = " ".join(f"{name} {float(value.detach()):.4f}" for name, value in losses.items())
                print(f"step {self.step} min {self.spent_s / 60:.1f} {shown}", flush=True)
            if self.step % CHECK_EVERY_STEPS == 0 or self.spent_s >= self.budget_s:
                self.check()

    def one_step(self) -> dict[str, Tensor]:
        share_done = self.spent_s / self.budget_s
        rng = np.random.default_rng([SEEDS["train"], self.step])
        batch = batch_of(self.pictures, rng.integers(len(self.pictures), size=BATCH), rng, self.parts)
        losses = self.learner.loss(batch, share_done)
        self.optimizer.zero_grad()
        losses["total"].backward()  # type: ignore[no-untyped-call]  # torch types it not
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, share_done)
        self.optimizer.step()
        self.step += 1
        return losses

    def check(self) -> None:
        """Score the network, keep it if it is the best so far, and write the checkpoint."""
        found = evaluate(self.learner.student, self.held_out)
        errors = f"PA {found['pa_mpjpe_mm']:.2f} mm, from the wrist {found['mpjpe_mm']:.1f} mm"
        print(f"step {self.step}: held out {errors}; mean pose PA {self.mean_pose_mm:.2f} mm", flush=True)
        if found["pa_mpjpe_mm"] < self.best:
            self.best = found["pa_mpjpe_mm"]
            self.learner.student.save(self.folder / "best")
        saved = {"learner": self.learner.state_dict(), "optimizer": self.optimizer.state_dict()}
        saved |= {"step": self.step, "spent_s": self.spent_s, "best": self.best}
        torch.save(saved, self.folder / "checkpoint.partial")
        (self.folder / "checkpoint.partial").replace(self.folder / "checkpoint.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=12000)
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--start-from", type=Path, help="a hamer.ckpt of these sizes, to train further")
    parser.add_argument("--export", type=Path, help="write the best network so far here instead of training")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    hand = load_hand_model("open-hand")
    held_out = synthesised(folder, "held-out", HELD_OUT)
    if arguments.export is not None:
        student = Student.load(folder / "best")
        export_hamer_checkpoint(student, arguments.export)
        print(evaluate(student, held_out), "mean pose", mean_pose_error(hand, held_out))
        return
    pictures = synthesised(folder, "train", arguments.pictures)
    run = Run(folder, arguments.minutes, pictures, held_out, hand)
    run.resume_or_start(arguments.start_from)
    run.train()


if __name__ == "__main__":
    main()
