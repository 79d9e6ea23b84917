"""Train the small teacher of the demo on synthesised hands, and write it as a checkpoint in HaMeR's layout.

    python benchmarks/train_demo_teacher.py FOLDER [--pictures 12000] [--minutes 80]
    python benchmarks/train_demo_teacher.py FOLDER --export models/assets/demo_teacher

Renders the training pictures into FOLDER first (ten minutes or so), then trains for the minutes given, counted over all
starts: stopped and started again it goes on from its last checkpoint. `--export` writes the best network so far.

A vision transformer learns slowly where to look from a hand's parameters alone. While it trains, each token therefore
also says which of the 21 joints it sees; that layer is left out of the checkpoint.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from models.crops import IDENTITY, Augmentation, HandLabels, crop, draw_augmentation, move_labels, square_box_px
from models.hand_model import HandModel, load_hand_model
from models.mano_head import DecoderSizes
from models.preprocessing import normalise
from models.student import Student, StudentSpec, export_hamer_checkpoint
from models.vit import VitSizes
from stages.config import HamerNpzDataset, SynthesiseConfig, SynthesiseSet
from stages.skinning import pose_hand, rotation_matrices
from stages.synthesise import run_unit, synthesise_units, unit_done
from trainer.config import LossWeights
from trainer.losses import label_losses, weighted
from trainer.metrics import mpjpe_mm, pa_mpjpe_mm

SPEC = StudentSpec(
    backbone="hamer",
    vit=VitSizes(embed_dim=192, depth=6, num_heads=6),
    decoder=DecoderSizes(dim=192, depth=2, heads=6, dim_head=32, mlp_dim=384),
)
BATCH = 16
LR, WARMUP_STEPS, WEIGHT_DECAY = 6e-4, 200, 0.02
WEIGHTS = LossWeights(keypoints_3d=0.05, keypoints_2d=0.03, global_orient=0.02, hand_pose=0.02, betas=0.0005)
TOKEN_LOSS_WEIGHT = 0.05
CHECK_EVERY_STEPS = 250
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

    def view(self, index: int, augmentation: Augmentation) -> tuple[NDArray[np.uint8], HandLabels]:
        """The 256 x 256 crop and its labels, as HaMeR's training makes them."""
        image = np.asarray(Image.open(self.files[index]).convert("RGB"))
        row = {name: values[index] for name, values in self.arrays.items()}
        pose, betas = row["hand_pose"].astype(np.float32), row["betas"].astype(np.float32)
        labels = HandLabels(row["hand_keypoints_2d"], row["hand_keypoints_3d"], pose[:3], pose[3:], betas)
        cut = crop(image, row["center"], square_box_px(row["scale"] / 200), bool(row["right"]), augmentation)
        return cut.picture, move_labels(labels, cut, augmentation)


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


def batch_of(pictures: Pictures, indices: NDArray[np.int64], rng: np.random.Generator | None) -> dict[str, Tensor]:
    """Pictures and labels of a batch; without a generator the plain crops."""
    views = [pictures.view(int(i), IDENTITY if rng is None else draw_augmentation(rng)) for i in indices]
    made = {"pictures": torch.from_numpy(np.stack([picture for picture, _ in views]))}
    for name in ("keypoints_2d", "keypoints_3d", "global_orient", "hand_pose", "betas"):
        made[name] = torch.from_numpy(np.stack([getattr(labels, name) for _, labels in views]).astype(np.float32))
    ones = torch.ones(len(views))
    return made | {"has_hand_pose": ones, "has_betas": ones}


class Learner(nn.Module):
    """The network, and the layer that names the joint each token sees."""

    def __init__(self, hand: HandModel) -> None:
        super().__init__()
        self.student = Student(SPEC, hand)
        self.joint_of_token = nn.Conv2d(SPEC.vit.embed_dim, 21, kernel_size=1) if SPEC.vit else nn.Identity()

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        out = self.student(normalise(batch["pictures"]))
        scores = self.joint_of_token(out["features"]).flatten(2).log_softmax(dim=2)
        targets = token_targets(batch["keypoints_2d"][..., :2])
        tokens = -(targets * scores).sum(dim=(1, 2)) / 21
        labels = weighted(label_losses(out, batch), WEIGHTS)
        return {"total": (labels + TOKEN_LOSS_WEIGHT * tokens).mean(), "labels": labels.mean(), "tokens": tokens.mean()}


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


def train(folder: Path, pictures: Pictures, held_out: Pictures, hand: HandModel, minutes: float) -> None:
    torch.manual_seed(0)
    learner = Learner(hand)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    checkpoint = folder / "checkpoint.pt"
    step, spent_s, best = 0, 0.0, float("inf")
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        learner.load_state_dict(state["learner"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent_s, best = state["step"], state["spent_s"], state["best"]
        print(f"goes on from step {step}, {spent_s / 60:.1f} minutes", flush=True)
    mean_pose_mm = mean_pose_error(hand, held_out)
    print(f"{len(pictures)} pictures; the mean pose errs by {mean_pose_mm:.2f} mm (PA) on {len(held_out)}", flush=True)
    last = time.monotonic()
    while spent_s < minutes * 60:
        rng = np.random.default_rng([SEEDS["train"], step])
        batch = batch_of(pictures, rng.integers(len(pictures), size=BATCH), rng)
        losses = learner.loss(batch)
        optimizer.zero_grad()
        losses["total"].backward()  # type: ignore[no-untyped-call]  # torch types it not
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, spent_s / (minutes * 60))
        optimizer.step()
        step += 1
        now = time.monotonic()
        spent_s, last = spent_s + now - last, now
        if step % 50 == 0:
            parts = " ".join(f"{name} {float(value.detach()):.4f}" for name, value in losses.items())
            print(f"step {step} min {spent_s / 60:.1f} {parts}", flush=True)
        if step % CHECK_EVERY_STEPS == 0 or spent_s >= minutes * 60:
            found = evaluate(learner.student, held_out)
            print(f"step {step} min {spent_s / 60:.1f} held out {found} mean pose {mean_pose_mm:.2f}", flush=True)
            if found["pa_mpjpe_mm"] < best:
                best = found["pa_mpjpe_mm"]
                learner.student.save(folder / "best")
            saved = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(saved | {"step": step, "spent_s": spent_s, "best": best}, folder / "checkpoint.partial")
            (folder / "checkpoint.partial").replace(checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=12000)
    parser.add_argument("--minutes", type=float, default=80)
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
    train(folder, synthesised(folder, "train", arguments.pictures), held_out, hand, arguments.minutes)


if __name__ == "__main__":
    main()
