"""HaMeR's network, at any size: ViT backbone, transformer head, MANO layer, projection. Forward only needs torch.

Reference: geopavlakos/hamer 3a01849. The state-dict names are those of its checkpoints: `backbone.*`, `mano_head.*`,
`mano.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field, ValidationError
from torch import Tensor, nn

from models.mano import ManoLayer
from models.mano_head import ManoHead, project
from models.preprocessing import FOCAL_LENGTH_PX, IMAGE_MEAN, IMAGE_STD
from models.sizes import IMAGE_SIZE, DecoderSizes, VitSizes
from models.vit import Vit
from storage.config import Section
from storage.errors import InputError
from storage.safe_yaml import read_yaml, shown


class HamerConfig(Section):
    """What of model_config.yaml decides the network's answers."""

    vit: VitSizes = VitSizes()
    decoder: DecoderSizes = DecoderSizes()
    focal_px: float = Field(default=FOCAL_LENGTH_PX, gt=0)

    @classmethod
    def from_yaml(cls, path: Path) -> HamerConfig:
        """Read HaMeR's model_config.yaml.

        What decides the answers must be there and be something this network does; every other key may be anything,
        unresolved `${...}` included. Sizes absent from MODEL.BACKBONE mean ViT-H. Raises InputError.
        """
        tree = read_model_config(path)
        kind = _look_up(tree, "MODEL.BACKBONE.TYPE")
        if kind != "vit":
            raise InputError(
                f"{path}: MODEL.BACKBONE.TYPE: found {shown(kind)}, and HaMeR's network is only 'vit'. A student of "
                "Fast-HaMeR's? models.student.Student.load reads those."
            )
        backbone = _look_up(tree, "MODEL.BACKBONE")
        sizes = {key.lower(): backbone[key] for key in ("EMBED_DIM", "DEPTH", "NUM_HEADS") if key in backbone}
        vit = _validated(path, "vit", VitSizes, sizes)
        decoder, focal_px = decoder_sizes(path, tree, vit.embed_dim)
        return _validated(path, "config", cls, {"vit": vit, "decoder": decoder, "focal_px": focal_px})

    def to_yaml(self) -> str:
        """A model_config.yaml that `from_yaml` and HaMeR's layout of keys agree on."""
        decoder = self.decoder.model_dump() | {"dropout": 0.0, "emb_dropout": 0.0, "norm": "layer"}
        head = {
            "TYPE": "transformer_decoder",
            "TRANSFORMER_DECODER": decoder | {"context_dim": self.vit.embed_dim},
        }
        backbone = {"TYPE": "vit"} | {key.upper(): value for key, value in self.vit.model_dump().items()}
        model = {
            "IMAGE_SIZE": IMAGE_SIZE,
            "IMAGE_MEAN": list(IMAGE_MEAN),
            "IMAGE_STD": list(IMAGE_STD),
            "BACKBONE": backbone,
            "MANO_HEAD": head,
        }
        return yaml.safe_dump({"EXTRA": {"FOCAL_LENGTH": self.focal_px}, "MODEL": model}, sort_keys=False)


_REQUIRED = {
    "MODEL.IMAGE_SIZE": IMAGE_SIZE,
    "MODEL.MANO_HEAD.TYPE": "transformer_decoder",
}
_IF_PRESENT = {
    "MODEL.IMAGE_MEAN": list(IMAGE_MEAN),
    "MODEL.IMAGE_STD": list(IMAGE_STD),
    "MODEL.BBOX_SHAPE": [192, 256],
    "MODEL.MANO_HEAD.JOINT_REP": "6d",
    "MODEL.MANO_HEAD.TRANSFORMER_INPUT": "zero",
    "MODEL.MANO_HEAD.IEF_ITERS": 1,
    "MODEL.MANO_HEAD.TRANSFORMER_DECODER.norm": "layer",
    "MANO.NUM_HAND_JOINTS": 15,
}


def decoder_sizes(path: Path, tree: Mapping[str, Any], channels: int) -> tuple[DecoderSizes, Any]:
    """Sizes of the head for a feature map of `channels`, and the focal length, of a model_config.yaml whose head and
    input are those of this package. Raises InputError where they are not."""
    for key, wanted in _REQUIRED.items():
        _check(path, key, _look_up(tree, key), wanted)
    for key, wanted in _IF_PRESENT.items():
        found = _look_up(tree, key)
        if found is not None:
            _check(path, key, found, wanted)
    decoder = _look_up(tree, "MODEL.MANO_HEAD.TRANSFORMER_DECODER")
    _check_decoder(path, decoder)
    given = {key: decoder[key] for key in DecoderSizes.model_fields if key in decoder}
    sizes = _validated(path, "decoder", DecoderSizes, given)
    context = decoder.get("context_dim", sizes.dim)
    _check(path, "MODEL.MANO_HEAD.TRANSFORMER_DECODER.context_dim", context, channels)
    return sizes, _look_up(tree, "EXTRA.FOCAL_LENGTH")


Model = TypeVar("Model", bound=Section)


def _validated(path: Path, what: str, model: type[Model], values: Mapping[str, Any]) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([what, *(str(part) for part in first["loc"])])
        raise InputError(f"{path}: {where}: found {shown(first['input'])}: {first['msg']}.") from error


def read_model_config(path: Path) -> Mapping[str, Any]:
    """A model_config.yaml as it stands, `${...}` unresolved; InputError when it is not readable as one."""
    try:
        tree = read_yaml(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: found {type(tree).__name__}, wanted HaMeR's model configuration (a mapping).")
    return tree


def _look_up(tree: Any, key: str) -> Any:
    """The value at a dotted path, or None."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _check(path: Path, key: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise InputError(f"{path}: {key}: found {shown(found)}, and this network is only {wanted!r}.")


def _check_decoder(path: Path, decoder: Any) -> None:
    absent = [key for key in ("depth", "heads", "mlp_dim") if not isinstance(decoder, dict) or key not in decoder]
    if absent:
        raise InputError(f"{path}: MODEL.MANO_HEAD.TRANSFORMER_DECODER: {', '.join(absent)} missing.")


class Hamer(nn.Module):
    """Normalised crops (B,3,256,256) to hands.

    Returns `features` (B,C,16,12); `cam` (B,3); `global_orient` (B,1,3,3), `hand_pose` (B,15,3,3), `betas` (B,10);
    `keypoints_3d` (B,21,3) and `vertices` (B,V,3), metres; `keypoints_2d` (B,21,2), crop units; `cam_t` (B,3), metres.
    """

    def __init__(self, config: HamerConfig, mano: ManoLayer) -> None:
        super().__init__()
        self.config = config
        self.backbone = Vit(config.vit)
        self.mano_head = ManoHead(config.decoder, config.vit.embed_dim)
        self.mano = mano

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
        return {"features": features} | hands_from_features(features, self.mano_head, self.mano, self.config.focal_px)


def hands_from_features(features: Tensor, head: ManoHead, mano: ManoLayer, focal_px: float) -> dict[str, Tensor]:
    """All outputs but `features`: what a head makes of a feature map (B,C,H,W)."""
    hand: dict[str, Tensor] = head(features)
    vertices, keypoints_3d = mano(hand["global_orient"], hand["hand_pose"], hand["betas"])
    keypoints_2d, cam_t = project(keypoints_3d, hand["cam"], focal_px)
    made = {"keypoints_3d": keypoints_3d, "keypoints_2d": keypoints_2d, "vertices": vertices, "cam_t": cam_t}
    return hand | made
