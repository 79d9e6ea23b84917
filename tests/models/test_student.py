"""Students: any timm backbone, one mapping, whole on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from models.mano_head import rotations_from_6d
from models.preprocessing import IMAGE_MEAN, IMAGE_STD, normalise
from models.sizes import VitSizes
from models.student import Student, StudentSpec, export_hamer_checkpoint, feature_shape
from storage.errors import DamageError, InputError
from tests.tiny_networks import TINY_HAMER, tiny_hand_model, tiny_student

SMALL = "mobilenetv3_small_050"


def student(backbone: str = SMALL, **options: Any) -> Student:
    torch.manual_seed(0)
    return Student(StudentSpec(backbone=backbone, head="light", **options), tiny_hand_model())


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("backbone", "shape"),
    [
        (SMALL, (288, 8, 8)),
        ("convnext_atto", (320, 8, 8)),
        ("repvit_m0_9", (384, 8, 8)),
        ("fastvit_t8", (768, 8, 8)),
        ("swin_s3_tiny_224", (768, 8, 8)),
        ("vit_tiny_patch16_224", (192, 16, 16)),
    ],
)
def test_every_kind_of_backbone_gives_one_map_and_trains_whole(backbone: str, shape: tuple[int, int, int]) -> None:
    made = student(backbone)
    outputs = made(torch.randn(2, 3, 256, 256))
    assert tuple(outputs["features"].shape[1:]) == made.feature_shape == feature_shape(made.spec) == shape
    assert outputs["vertices"].shape == (2, 750, 3)
    (outputs["vertices"].sum() + outputs["keypoints_2d"].sum()).backward()
    still = [name for name, parameter in made.named_parameters() if parameter.grad is None]
    assert not still


@pytest.mark.parametrize(
    ("backbone", "shape"),
    [
        (SMALL, (288, 4, 4)),
        ("vit_tiny_patch16_224", (192, 8, 8)),
        ("torchvision/mobilenet_v3_small", (576, 4, 4)),
        ("torchvision/vit_b_16", (768, 14, 14)),
    ],
)
def test_a_backbone_may_look_at_a_smaller_picture(tmp_path: Path, backbone: str, shape: tuple[int, int, int]) -> None:
    made = student(backbone, input_px=128).eval()
    assert feature_shape(made.spec) == made.feature_shape == shape
    small = torch.randn(1, 3, 128, 128)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)  # the mean of each four of which is the small one
    torch.testing.assert_close(made(large)["features"], made.backbone(small), rtol=0, atol=2e-5)
    made.save(tmp_path)
    assert Student.load(tmp_path).feature_shape == shape


@pytest.mark.parametrize(
    ("backbone", "shape"),
    [
        (SMALL, (24, 8, 8)),
        ("repvit_m0_9", (192, 8, 8)),
        ("fastvit_t8", (192, 8, 8)),
        ("convnext_atto", (160, 8, 8)),
        ("vit_tiny_patch16_224", (192, 8, 8)),
    ],
)
def test_a_stage_on_the_way_shows_what_it_sees(backbone: str, shape: tuple[int, int, int]) -> None:
    made = student(backbone, input_px=128).eval()
    images = torch.randn(2, 3, 256, 256)
    last, stage = made(images), made(images, at_stride=16)
    assert tuple(stage["features"].shape[1:]) == feature_shape(made.spec, 16) == shape
    assert torch.equal(stage["vertices"], last["vertices"])


def test_stages_that_are_not_there() -> None:
    with pytest.raises(InputError, match="found maps of stride 16, none of 8"):
        feature_shape(StudentSpec(backbone="vit_tiny_patch16_224"), 8)
    for backbone in ("hamer", "torchvision/mobilenet_v3_small"):
        with pytest.raises(InputError, match="only timm's networks tell their stages"):
            feature_shape(StudentSpec(backbone=backbone), 16)


@pytest.mark.parametrize("side", [96, 130, 288])
def test_sides_that_no_backbone_can_look_at(side: int) -> None:
    with pytest.raises(ValidationError, match="input_px"):
        StudentSpec(backbone=SMALL, input_px=side)
    with pytest.raises(ValidationError, match="HaMeR's own network looks at 256"):
        StudentSpec(backbone="hamer", input_px=128)


def test_light_head_is_light() -> None:
    assert parameters(student().mano_head) < 2.5e6
    paper = Student(StudentSpec(backbone=SMALL), tiny_hand_model())
    assert parameters(paper.mano_head) > 30e6


@pytest.mark.parametrize("name", ["mobilnetv3_small_050", "mobilenet_v3_small_050", "mobilenetv3_small_05"])
def test_misspelt_backbone(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}.*Did you mean .*mobilenetv3_small_050"):
        feature_shape(StudentSpec(backbone=name))


def test_backbone_without_a_feature_map() -> None:
    with pytest.raises(InputError, match="gives no feature map"):
        feature_shape(StudentSpec(backbone="crossvit_9_240"))


def test_spec_is_strict() -> None:
    with pytest.raises(ValidationError, match="extra"):
        StudentSpec(backbone=SMALL, haed="light")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="sizes of the backbone 'hamer'"):
        StudentSpec(backbone=SMALL, vit=VitSizes())


def test_untrained_student_answers_the_mean_hand() -> None:
    made = student().eval()
    outputs = made(torch.zeros(1, 3, 256, 256))
    torch.testing.assert_close(outputs["global_orient"], torch.eye(3)[None, None], rtol=0, atol=0.1)
    assert outputs["cam"][0, 0].item() == pytest.approx(4, abs=0.1)
    inside = outputs["keypoints_2d"].abs().max()
    assert inside < 1  # a hand of 0.2 m is about as large as the crop


@pytest.mark.parametrize("spec", [StudentSpec(backbone=SMALL, head="light"), TINY_HAMER], ids=["timm", "hamer"])
def test_saved_student_answers_the_same(tmp_path: Path, spec: StudentSpec) -> None:
    made = Student(spec, tiny_hand_model())
    made(torch.randn(2, 3, 256, 256))  # moves the running statistics of batch norms
    made.eval()
    made.save(tmp_path)
    loaded, images = Student.load(tmp_path), torch.randn(2, 3, 256, 256)
    assert not loaded.training
    wanted = made(images)
    assert all(torch.equal(value, wanted[name]) for name, value in loaded(images).items())


def test_saving_is_deterministic_and_overwrites(tmp_path: Path) -> None:
    for folder in ("a", "b", "a"):
        tiny_student().save(tmp_path / folder)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert len(list((tmp_path / "a").iterdir())) == 3


def test_damaged_students_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no student"):
        Student.load(tmp_path)
    tiny_student().save(tmp_path)
    weights = load_file(tmp_path / "weights.safetensors")
    del weights["mano_head.decpose.bias"]
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(DamageError, match=r"mano_head\.decpose\.bias"):
        Student.load(tmp_path)
    spec = (tmp_path / "student.json").read_text()
    assert '"weights": null' in spec
    (tmp_path / "student.json").write_text(spec.replace('"weights": null', '"weights": "/etc/passwd"'))
    with pytest.raises(DamageError, match=r"spec\.weights names a file"):
        Student.load(tmp_path)
    for name in ("weights.safetensors", "hand_model.safetensors", "student.json"):
        (tmp_path / name).write_bytes(b"{")
        with pytest.raises(DamageError, match="not readable"):
            Student.load(tmp_path)


def test_seed_decides_the_weights_whatever_was_built_before() -> None:
    from models.backbones import _anatomy

    _anatomy.cache_clear()
    with torch.no_grad():
        feature_shape(StudentSpec(backbone="convnext_atto"))
    first, second = student(), student()
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


def test_local_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    pretrained = timm.create_model(SMALL)
    save_file(pretrained.state_dict(), tmp_path / "a.safetensors")
    torch.save(pretrained.state_dict(), tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        made = student(weights=str(tmp_path / name))
        assert torch.equal(made.backbone.body.conv_stem.weight, pretrained.conv_stem.weight)
        assert torch.equal(made.backbone.body.blocks[-1][0].conv.weight, pretrained.blocks[-1][0].conv.weight)
        made.save(tmp_path / "student")
        assert Student.load(tmp_path / "student").spec.weights is None


def test_a_student_starts_from_another_one(tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = Student(StudentSpec(backbone=SMALL, head="light"), tiny_hand_model())
    other(torch.randn(2, 3, 256, 256))  # moves the running statistics, which come along
    other.save(tmp_path)
    weights = str(tmp_path / "weights.safetensors")
    made = student(weights=weights)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in made.state_dict().items())
    smaller = student(weights=weights, input_px=128)  # the same weights at another size of picture
    assert torch.equal(smaller.mano_head.decpose.weight, other.mano_head.decpose.weight)
    with pytest.raises(InputError, match=r"a student of another network: backbone\..* wanted"):
        student("mobilenetv3_small_075", weights=weights)
    with pytest.raises(InputError, match=r"a student of another network: mano_head\..* wanted"):
        Student(StudentSpec(backbone=SMALL, weights=weights), tiny_hand_model())


def test_position_embedding_fits_the_picture(tmp_path: Path) -> None:
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "a.safetensors")
    made = student("vit_tiny_patch16_224", weights=str(tmp_path / "a.safetensors"))
    assert made.backbone.body.pos_embed.shape == (1, 257, 192)


def test_weights_of_another_network(tmp_path: Path) -> None:
    state = timm.create_model(SMALL).state_dict()
    stem = state.pop("conv_stem.weight")
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, r"conv_stem\.weight is missing"),
        ({"conv_stem.weight": stem, "stages.0.weight": stem.clone()}, r"stages\.0\.weight is no part of"),
        ({"conv_stem.weight": stem[:4]}, "not the weights of"),
    ]
    for added, message in cases:
        save_file(state | added, tmp_path / "a.safetensors")
        with pytest.raises(InputError, match=message):
            student(weights=str(tmp_path / "a.safetensors"))
    with pytest.raises(InputError, match="no such file"):
        student(weights=str(tmp_path / "none.pth"))


def test_only_hamers_network_exports_as_hamers_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only 'hamer'"):
        export_hamer_checkpoint(student(), tmp_path)


@pytest.mark.parametrize(("backbone", "smaller"), [("repvit_m0_9", True), ("fastvit_t8", True), (SMALL, False)])
def test_a_fused_student_answers_the_same(tmp_path: Path, backbone: str, smaller: bool) -> None:
    made, images = student(backbone), torch.randn(2, 3, 256, 256)
    with torch.no_grad():
        made(images)  # moves the running statistics, so that there is something to fold
        made.eval()
        fused, wanted = made.fused(), made(images)
        for name, value in fused(images).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
    assert (parameters(fused) < parameters(made)) is smaller
    made.save(tmp_path)
    with pytest.raises(AssertionError, match="fused"):
        fused.save(tmp_path)


def test_fastvit_is_kept_out_of_channels_last() -> None:
    assert student().channels_last_safe
    assert not student("fastvit_t8").channels_last_safe


def test_rotations_are_rotations() -> None:
    columns = torch.randn(100, 6)
    rotations = rotations_from_6d(columns)
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand(100, 3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(100), rtol=0, atol=1e-5)
    known = torch.tensor([[0.0, 1, 0, -1, 0, 0]])  # its first two columns, one after the other
    assert rotations_from_6d(known)[0].tolist() == [[0, -1, 0], [1, 0, 0], [0, 0, 1]]


def test_normalise() -> None:
    pictures = torch.randint(0, 256, (2, 256, 256, 3), dtype=torch.uint8)
    made = normalise(pictures)
    wanted = (pictures.double() / 255 - torch.tensor(IMAGE_MEAN).double()) / torch.tensor(IMAGE_STD).double()
    torch.testing.assert_close(made.double(), wanted.permute(0, 3, 1, 2), rtol=0, atol=1e-6)
    assert made.is_contiguous()
    with pytest.raises(AssertionError):
        normalise(pictures.float())
