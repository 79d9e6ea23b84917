"""The documents of an export: preprocessing and conventions as data, and the model card. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from models.hand_model import FINGERTIP_VERTICES, OPEN_HAND, hand_model_digest, load_hand_model
from trainer.config import TRAINED, better_by

DESCRIPTION, RUNTIME, HAND_MODEL, EXPORT = "preprocessing.json", "handstill_numpy.py", "hand_model.npz", "export.json"
FORMAT_VERSION = 1

JOINT_ORDER = (
    "wrist",
    *(f"{finger}_{joint}" for finger in ("thumb",) for joint in ("cmc", "mcp", "ip", "tip")),
    *(f"{finger}_{joint}" for finger in ("index", "middle", "ring", "pinky") for joint in ("mcp", "pip", "dip", "tip")),
)
"""Of keypoints: OpenPose's 21."""
POSE_ORDER = tuple(f"{finger}_{i}" for finger in ("index", "middle", "pinky", "ring", "thumb") for i in (1, 2, 3))
"""Of hand_pose: MANO's 15, from the palm outwards."""
TIGHT_BOX_FACTOR = 2.0
"""The crop's side over the longer side of a tight box (models.crops.HINT_BOX)."""

MANO_LICENCE = (
    "MANO licence of the Max Planck Society: non-commercial scientific research, no redistribution "
    "(https://mano.is.tue.mpg.de/license.html); or that of the file it was read from"
)


@lru_cache
def _open_hand_digest() -> str:
    return hand_model_digest(load_hand_model(OPEN_HAND))


def hand_model_licence(digest: str) -> str:
    """The licence of the hand model with that digest: only the built-in one is known to be free."""
    return "CC0 1.0: handstill's open hand" if digest == _open_hand_digest() else MANO_LICENCE


def describe_network(*, with_hand_model: bool, inner_columns: bool) -> dict[str, Any]:
    """preprocessing.json, but for the network's file name. `inner_columns`: it sees 192 columns of the crop's 256, as
    HaMeR's ViT does, and wants wider crops of wide boxes."""
    # Imported late: torch and OpenCV; the numbers stand with the code that trained with them.
    from models.crops import CROP_PX, DEMO_BOX, HINT_BOX
    from models.preprocessing import FOCAL_LENGTH_PX, IMAGE_MEAN, IMAGE_STD

    box = DEMO_BOX if inner_columns else HINT_BOX
    assert box.rescale == TIGHT_BOX_FACTOR
    return {
        "format": "handstill-export",
        "format_version": FORMAT_VERSION,
        "input": {
            "name": "images",
            "shape": ["batch", 3, CROP_PX, CROP_PX],
            "dtype": "float32",
            "colour": "RGB",
            "value": "(level / 255 - mean) / std, level 0..255",
            "mean": list(IMAGE_MEAN),
            "std": list(IMAGE_STD),
        },
        "crop": {
            "side_px": CROP_PX,
            "shape": "a square, not turned, around the middle of the hand's box; outside the photograph is black",
            "of_tight_box": TIGHT_BOX_FACTOR,
            "widen_to": None if box.aspect is None else list(box.aspect),
            "rule": "side = of_tight_box * the longer side of a tight box, widened to the aspect widen_to (width, "
            "height) before, if there is one; boxes annotated with a margin, as in HaMeR's training data, are taken "
            "as they are",
            "map": "photo px = middle + (crop px - side_px / 2) * side / side_px, pixel centres at whole numbers",
            "interpolation": "bilinear, places rounded to 1/32 px (OpenCV 4 warpAffine)",
            "antialias": "side > 2.2 * side_px: first a Gaussian over the photograph, sigma = (side / side_px / 2 - 1) "
            "/ 2 px, cut at 4 sigma, edges continued",
        },
        "left_hands": {
            "in": "mirror the photograph (x -> width - 1 - x) before cutting: the network knows right hands only",
            "out": "negate x of keypoints_3d, of vertices and of the camera's translation; keypoints_2d come back by "
            "the crop's mapping; turn the faces' corners round",
            "rotations": "global_orient and hand_pose are those of the mirrored hand; for a left hand's own, negate "
            "the y and z of their axis-angles, and use a left hand model",
        },
        "camera": {
            "cam": "(s, tx, ty)",
            "focal_px": FOCAL_LENGTH_PX,
            "in_crop": "cam_t = (tx, ty, 2 * focal_px / (side_px * s)) metres; crop units = focal_px / side_px * "
            "(X + tx, Y + ty) / (Z + cam_t_z), 0 at the crop's middle, 0.5 at its edge",
            "in_photo": "focal = focal_px / side_px * max(width, height); translation = (tx + 2 (cx - width / 2) / "
            "(s * side), ty + 2 (cy - height / 2) / (s * side), 2 * focal / (s * side)); (cx, cy): the box's middle, "
            "side: its side, photo px; principal point: the photograph's middle",
            "depth": "only as right as the focal length, which is HaMeR's convention and not the photograph's own",
        },
        "outputs": _outputs(with_hand_model=with_hand_model),
        "hand_layer": "MANO's: keypoints_3d and vertices from global_orient, hand_pose and betas; no mean pose added; "
        f"fingertips are vertices {', '.join(map(str, FINGERTIP_VERTICES))}",
        "keypoints_order": list(JOINT_ORDER),
        "hand_pose_order": list(POSE_ORDER),
    }


def _outputs(*, with_hand_model: bool) -> dict[str, Any]:
    frame = "metres; x right, y down, z forward; the hand's own origin"
    outputs = {
        "global_orient": {"shape": ["batch", 1, 3, 3], "meaning": "rotation matrix of the wrist in the camera's frame"},
        "hand_pose": {"shape": ["batch", 15, 3, 3], "meaning": "rotation matrices of the joints, each in its parent's"},
        "betas": {"shape": ["batch", 10], "meaning": "shape coefficients of the hand model"},
        "cam": {"shape": ["batch", 3], "meaning": "weak-perspective camera of the crop"},
    }
    if with_hand_model:
        outputs["keypoints_3d"] = {"shape": ["batch", 21, 3], "meaning": frame}
        outputs["vertices"] = {"shape": ["batch", "vertices", 3], "meaning": frame}
    return outputs


# ---- the model card -------------------------------------------------------------------------------------------------


def model_card(facts: Mapping[str, Any]) -> str:
    """README.md of an export.

    facts: what `trainer.export` puts into export.json. `provenance`, all of it optional: `student` {name, seed,
    identity}; `training` {recipe, data sets, steps, ...}; `data_sets` and `teacher`: name -> licence or None;
    `metrics`: data set -> metric -> value; `teacher_metrics` and `mean_pose_metrics` likewise; `weights`: the file that
    the backbone began with; `registered`: models:/NAME/VERSION.
    """
    provenance = facts["provenance"]
    student = provenance.get("student", {})
    title = f"{student.get('name', facts['backbone'])}, a 3D hand mesh network"
    parts = [
        f"# {title}",
        _what_it_is(facts, student),
        _files(facts),
        _use(facts),
        _equality(facts),
        _metrics(provenance),
        _training(provenance),
        _licences(facts, provenance),
        _limits(provenance),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what_it_is(facts: Mapping[str, Any], student: Mapping[str, Any]) -> str:
    which = f" Seed {student['seed']}, identity `{student['identity'][:16]}`." if "identity" in student else ""
    registered = facts["provenance"].get("registered")
    version = f" Version `{registered}` of the model registry." if registered else ""
    return (
        "A 256x256 picture of one hand in; rotations, shape and camera of a MANO-like hand out, and with a hand model "
        f"21 joints and a mesh. Backbone `{facts['backbone']}`, {facts['parameters'] / 1e6:.1f} M parameters, "
        f"`{facts['network']['file']}` {facts['network']['bytes'] / 1e6:.1f} MB. Made with handstill, by distillation "
        f"from HaMeR's architecture.{which}{version}"
    )


def _files(facts: Mapping[str, Any]) -> str:
    inside = facts["hand_model"]["inside"]
    hand = (
        "in the graph, and as arrays (faces) in this folder"
        if inside
        else f"**not in this folder**: it stands beside it, under this folder's name and `.{HAND_MODEL}`"
    )
    rows = [
        (facts["network"]["file"], "the network, any batch size"),
        (DESCRIPTION, "what goes in and what comes out, as data: crop, camera, left hands, order of the joints"),
        (RUNTIME, "crop, hand layer and camera with numpy, Pillow and onnxruntime only"),
        ("weights.safetensors, student.json", f"the {'float' if facts['int8'] else 'same'} weights, for PyTorch"),
        (HAND_MODEL, f"the hand model: {hand}"),
        *([("hand_model.safetensors", "the same for PyTorch")] if inside else []),
        ("export.json", "what went in, the check, sha256 of every file"),
    ]
    return "## Files\n\n" + _table(("file", "what"), rows)


def _use(facts: Mapping[str, Any]) -> str:
    outside = (
        f"\n\nThe hand model is found beside the folder, as EXPORT.{HAND_MODEL}, or in it, as {HAND_MODEL}; one that "
        'lies elsewhere is named: `Hands("EXPORT", "FILE.npz")`.'
    )
    return (
        "## Use\n\n"
        "`pip install onnxruntime numpy pillow`, then, with this folder as EXPORT:\n\n"
        "```python\n"
        "from handstill_numpy import Box, Hands\n\n"
        'hands = Hands("EXPORT")\n'
        'for hand in hands.in_photo("photo.jpg", [Box(x=210, y=80, width=250, height=270, right=True)]):\n'
        "    print(hand.keypoints_2d, hand.keypoints_3d, hand.vertices.shape)\n"
        "```\n\n"
        f"The box is a tight one, in pixels of the photograph; the crop is {TIGHT_BOX_FACTOR:g} times its longer side."
    ) + ("" if facts["hand_model"]["inside"] else outside)


def _equality(facts: Mapping[str, Any]) -> str:
    difference, int8 = facts["difference_from_pytorch"], facts["int8"]
    text = (
        f"## Against PyTorch\n\nONNX Runtime on {difference['pictures']} pictures, in batches of "
        f"{', '.join(map(str, difference['batch_sizes']))}: joints differ from the PyTorch student's by at most "
        f"{difference['joints_mm']:.2g} mm, vertices by {difference['vertices_mm']:.2g} mm, joints in the crop by "
        f"{difference['keypoints_2d_px']:.2g} px."
    )
    if not int8:
        return text
    words = {
        "joints_mean_mm": "joints, mean distance from the float network's, from the wrist",
        "joints_p95_mm": "the same, 95th percentile of hands",
        "joints_aligned_mm": "the same after alignment",
    }
    rows = [(words.get(name, name), f"{value:.3f}") for name, value in int8.items()]
    return f"{text} That is the float graph, from which the int8 one was made. What int8 costs:\n\n" + _table(
        ("what", "mm"), rows
    )


_NO_RECORDS = "Not known: this student was given without its run's records."


def _metrics(provenance: Mapping[str, Any]) -> str:
    scores: Mapping[str, Mapping[str, float]] = provenance.get("metrics") or {}
    if not scores:
        return "## Metrics\n\n" + ("Not evaluated." if "metrics" in provenance else _NO_RECORDS)
    others = [provenance.get(which) or {} for which in ("teacher_metrics", "mean_pose_metrics")]
    rows = [
        (name, metric, f"{value:.3f}", *(_known(other.get(name, {}).get(metric)) for other in others))
        for name, found in scores.items()
        for metric, value in found.items()
    ]
    note = (
        "Of the PyTorch student; official definitions (trainer/metrics.py). F-scores, AUC and PCK are shares. Mean "
        "pose: the same answer to every picture, without looking.\n\n"
    )
    return f"## Metrics\n\n{note}" + _table(("data set", "metric", "student", "teacher", "mean pose"), rows)


def _known(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _undertrained(provenance: Mapping[str, Any]) -> list[str]:
    """The data sets on which it is hardly better than answering without looking, by PA-MPJPE; in words."""
    scores, baseline = (provenance.get(which) or {} for which in ("metrics", "mean_pose_metrics"))
    which, said = "pa_mpjpe_mm", []
    for name, found in scores.items():
        mean_pose = baseline.get(name, {}).get(which)
        if which in found and mean_pose and (gain := 1 - found[which] / mean_pose) < TRAINED:
            said.append(f"on {name} {better_by(gain)}")
    return said


def _training(provenance: Mapping[str, Any]) -> str:
    training: Mapping[str, Any] = provenance.get("training") or {}
    if not training:
        return f"## Training\n\n{_NO_RECORDS}"
    return "## Training\n\n" + _table(("what", "value"), [(name, f"`{value}`") for name, value in training.items()])


def _licences(facts: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    unknown = "not stated in the pipeline file (`licence`): ask whoever made it"
    rows = [("hand model", facts["hand_model"]["licence"])]
    rows += [(f"teacher {name}", licence or unknown) for name, licence in (provenance.get("teacher") or {}).items()]
    rows += [(f"data set {name}", licence or unknown) for name, licence in (provenance.get("data_sets") or {}).items()]
    if provenance.get("weights"):
        rows.append((f"pretrained weights {provenance['weights']}", "not stated: ask whoever made them"))
    rows += [(RUNTIME, "Apache-2.0")]
    inside = "The graph holds the hand model's numbers: pass this folder on only as that licence allows."
    outside = (
        "The hand model is not in this folder. Its mean pose, 45 numbers, is where the head starts from, as in every "
        "checkpoint of HaMeR."
    )
    text = "The weights are under what the licences of their ingredients leave:\n\n"
    return f"## Licences\n\n{text}{_table(('what went in', 'licence'), rows)}\n\n" + (
        inside if facts["hand_model"]["inside"] else outside
    )


def _limits(provenance: Mapping[str, Any]) -> str:
    little = " the mean pose, ".join(_undertrained(provenance))
    first = f"**Trained too little to be of use: {little} the mean pose.** " if little else ""
    if provenance.get("rendered_only"):
        first += "It has learned from rendered hands only, never from a photograph. "
    return (
        f"## Limits\n\n{first}One hand a crop, whose side (left or right) must be told. Depths rest on an assumed "
        "focal length. Not for identifying people."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
