"""Students that Fast-HaMeR's own code trained: the same answers, every entry of their swollen files accounted for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision.models as tv
import yaml
from torch import Tensor, nn

from models.fast_hamer import describe_checkpoint, load_fast_hamer
from models.hamer import hands_from_features
from models.mano import ManoLayer
from models.mano_head import ManoHead
from models.sizes import DecoderSizes
from models.student import Student, StudentSpec
from storage.errors import InputError
from tests.tiny_networks import TINY_HAMER, tiny_hand_model, tiny_student

HEAD = {"depth": 1, "heads": 2, "mlp_dim": 16, "dim_head": 8, "dim": 16}
DECODER = DecoderSizes(**HEAD)


class PublishedViT(nn.Module):
    """As published: torchvision's transformer under `model.`, its classifier kept and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tv.vit_b_16()

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False)
        model = self.model
        tokens = torch.cat([model.class_token.expand(len(x), -1, -1), model._process_input(x)], 1)
        tokens = tokens + model.encoder.pos_embedding
        for block in model.encoder.layers:
            tokens = block(tokens)
        return model.encoder.ln(tokens)[:, 1:].permute(0, 2, 1).reshape(len(x), -1, 14, 14)


def cut(model: nn.Module, last: int) -> nn.Sequential:
    return nn.Sequential(*list(model.children())[:last])


PUBLISHED: dict[str, tuple[dict[str, Any], int, Callable[[], nn.Module]]] = {
    "mobilenet": ({"TYPE": "mobilenet_v3", "SIZE": "large"}, 960, lambda: tv.mobilenet_v3_large().features),
    "resnet": ({"TYPE": "resnet", "SIZE": 50}, 2048, lambda: cut(tv.resnet50(), -2)),
    "mobilevit": ({"TYPE": "mobilevit", "SIZE": "small"}, 640, lambda: cut(timm.create_model("mobilevit_s"), -1)),
    "efficientnet": (
        {"TYPE": "efficientnet_v2", "SIZE": "medium"},
        1280,
        lambda: cut(tv.efficientnet_v2_m(), -1),
    ),
    "vit": ({"TYPE": "vit_default", "SIZE": "base"}, 768, PublishedViT),
}


def write_published(folder: Path, backbone_config: dict[str, Any], channels: int, backbone: nn.Module) -> Path:
    """A run's folder as Fast-HaMeR leaves it: the teacher inside the checkpoint, an unresolved configuration."""
    head, mano = ManoHead(DECODER, channels), ManoLayer(tiny_hand_model())
    head.start_from_mean(tiny_hand_model())
    torch.nn.init.normal_(head.decpose.weight, std=0.1)
    state: dict[str, Tensor] = {"initialized": torch.tensor(False)}
    parts: dict[str, nn.Module] = {"backbone": backbone, "mano_head": head, "mano": mano, "teacher": tiny_student()}
    parts |= {"channel_projection": nn.Conv2d(1280, channels, 1), "discriminator": nn.Linear(3, 2)}
    for name, part in parts.items():
        state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"epoch": 3, "global_step": 5, "state_dict": state, "loops": {}}, folder / "checkpoints" / "last.ckpt")
    tree = {
        "EXTRA": {"FOCAL_LENGTH": 5000},
        "GENERAL": {"DISTILLATION": "full"},
        "MANO": {"DATA_DIR": "_DATA/data/", "MODEL_PATH": "${MANO.DATA_DIR}/mano", "NUM_HAND_JOINTS": 15},
        "MODEL": {
            "IMAGE_SIZE": 256,
            "BACKBONE": backbone_config | {"FEATURE_DIM": channels, "SPATIAL_HEIGHT": 8, "SPATIAL_WIDTH": 8},
            "MANO_HEAD": {"TYPE": "transformer_decoder", "TRANSFORMER_DECODER": HEAD | {"context_dim": channels}},
        },
    }
    (folder / "model_config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_student_answers_as_its_own_code_would(name: str, tmp_path: Path, images: Tensor) -> None:
    config, channels, make = PUBLISHED[name]
    torch.manual_seed(2)
    backbone = make()
    checkpoint = write_published(tmp_path / "run", config, channels, backbone)
    student, report = load_fast_hamer(checkpoint)
    assert not student.training
    with torch.no_grad():
        features = backbone.eval()(images)
        outputs = student(images)
        wanted = hands_from_features(features, student.mano_head, student.mano, 5000.0)
    torch.testing.assert_close(outputs["features"], features, rtol=1e-5, atol=1e-5)
    assert tuple(features.shape[1:]) == student.feature_shape
    torch.testing.assert_close(outputs["vertices"], wanted["vertices"], rtol=1e-5, atol=1e-6)

    ignored = {entry.split(".")[0]: why for entry, why in report.ignored.items() if not entry.startswith("backbone")}
    assert ignored.keys() == {"teacher", "channel_projection", "discriminator", "initialized"}
    assert "inside each of its students" in ignored["teacher"]
    assert (report.missing, report.unexpected) == ((), ())
    entries = torch.load(checkpoint, weights_only=True)["state_dict"].keys()
    assert set(report.used) | set(report.ignored) == set(entries)
    assert any(entry.startswith("backbone.model.heads") for entry in report.ignored) == (name == "vit")

    student.save(tmp_path / "slim")
    again = Student.load(tmp_path / "slim")
    with torch.no_grad():
        assert torch.equal(again(images)["vertices"], outputs["vertices"])


def test_a_checkpoint_is_described_without_loading_it(tmp_path: Path) -> None:
    config, channels, make = PUBLISHED["mobilevit"]
    checkpoint = write_published(tmp_path, config, channels, make())
    rewrite(checkpoint, lambda state: state.pop("mano_head.deccam.bias"))
    found = describe_checkpoint(checkpoint)
    assert (found.network, found.model_config) == ("mobilevit_s", tmp_path / "model_config.yaml")
    student = Student(StudentSpec(backbone="mobilevit_s", decoder=DECODER), tiny_hand_model())
    assert found.parameters == sum(parameter.numel() for parameter in student.parameters())
    assert (found.report.missing, found.report.unexpected) == (("mano_head.deccam.bias",), ())
    assert sum(name.startswith("teacher.") for name in found.report.ignored) == len(tiny_student().state_dict())


def test_student_load_takes_a_checkpoint_too(tmp_path: Path, images: Tensor) -> None:
    config, channels, make = PUBLISHED["mobilenet"]
    checkpoint = write_published(tmp_path, config, channels, make())
    assert Student.load(checkpoint).spec == StudentSpec(backbone="torchvision/mobilenet_v3_large", decoder=DECODER)


def test_a_student_with_hamers_own_backbone(tmp_path: Path, images: Tensor) -> None:
    torch.manual_seed(3)
    published = Student(TINY_HAMER.model_copy(update={"decoder": DECODER}), tiny_hand_model())
    sizes = {"EMBED_DIM": 24, "DEPTH": 2, "NUM_HEADS": 3}
    checkpoint = write_published(tmp_path, {"TYPE": "vit"} | sizes, 24, published.backbone)
    student, _ = load_fast_hamer(checkpoint)
    with torch.no_grad():
        assert torch.equal(student(images)["features"], published.eval()(images)["features"])


def rewrite(checkpoint: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    content = torch.load(checkpoint, weights_only=True)
    change(content["state_dict"])
    torch.save(content, checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("backbone.1.block.0.0.weight"), r"backbone.1.block.0.0.weight is missing \(1 such"),
        (lambda state: state.update({"backbone.99.weight": torch.zeros(1)}), "backbone.99.weight is left over"),
        (lambda state: state.update({"mano_head.deccam.bias": torch.zeros(4)}), r"has shape \(4,\), wanted \(3,\)"),
        (lambda state: state.update({"mano_head.deccam.bias": torch.full((3,), torch.nan)}), "holds NaN"),
        (lambda state: [state.pop(key) for key in list(state) if key.startswith("mano.")], "no hand model"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Any, message: str) -> None:
    config, channels, make = PUBLISHED["mobilenet"]
    checkpoint = write_published(tmp_path, config, channels, make())
    rewrite(checkpoint, change)
    with pytest.raises(InputError, match=message):
        load_fast_hamer(checkpoint)


def test_an_unknown_backbone_lists_the_known(tmp_path: Path) -> None:
    _, channels, make = PUBLISHED["mobilenet"]
    checkpoint = write_published(tmp_path, {"TYPE": "resnet", "SIZE": 18}, channels, make())
    with pytest.raises(InputError, match=r"found TYPE 'resnet', SIZE 18. Wanted one of: .*wide_resnet"):
        load_fast_hamer(checkpoint)


def test_torchvision_weights_from_a_local_file(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = tv.mobilenet_v3_small()
    torch.save(model.state_dict(), tmp_path / "small.pth")
    spec = StudentSpec(backbone="torchvision/mobilenet_v3_small", head="light", weights=str(tmp_path / "small.pth"))
    made = Student(spec, tiny_hand_model())
    assert torch.equal(made.backbone.body[0][0].weight, model.features[0][0].weight)  # type: ignore[index,union-attr]
    with pytest.raises(InputError, match="not the weights of resnet50"):
        Student(spec.model_copy(update={"backbone": "torchvision/resnet50"}), tiny_hand_model())
    with pytest.raises(InputError, match=r"found no such network. Wanted one of mobilenet_v3_large"):
        Student(StudentSpec(backbone="torchvision/mobilenet_v2"), tiny_hand_model())
