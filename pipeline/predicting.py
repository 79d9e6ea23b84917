"""`handstill predict`: the hands in pictures, folders of them and videos, by any network; and the same from Python."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.hand_box import HandBox, hand_box
from models.hand_detector import HandDetector, load_hand_detector
from models.photo_hands import RESCALE, HandPredictor, PredictedHand
from pipeline.networks import TEACHER, NamedNetwork, open_network
from pipeline.progress import StageProgress
from pipeline.tables import table
from stages.overlay import draw_hands
from stages.photos import RESULT_SUFFIX, Photo, find_photos, look_at_video, read_photo, video_frames
from stages.prediction_files import MeshFormat, VideoFiles, check_replaceable, result_folder, write_photo
from storage.errors import InputError

log = logging.getLogger("handstill")

Boxes = Mapping[Path, Sequence[HandBox]]


@dataclass(frozen=True)
class PredictRequest:
    """What the command line asks for."""

    paths: Sequence[Path]
    out: Path
    network: str = TEACHER
    config: Path = Path("pipeline.yaml")
    mano_model: str | None = None
    boxes: Sequence[HandBox] = ()
    """Of the one picture or video that is named."""
    boxes_file: Path | None = None
    detector: Path | None = None
    rescale: float = RESCALE
    focal_px: float | None = None
    mesh: MeshFormat = "obj"


class Predictor:
    """A network and a detector for whole photographs; made by `load_predictor`."""

    def __init__(self, named: NamedNetwork, detector: Path | None, rescale: float, focal_px: float | None) -> None:
        self.named = named
        self._hands = HandPredictor(
            named.network,
            named.hand_model,
            sees_inner_columns=named.sees_inner_columns,
            rescale=rescale,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        self._focal_px = focal_px
        self._detector_source = detector
        self._detector: HandDetector | None = None

    def __call__(
        self,
        photo: str | Path | NDArray[np.uint8],
        boxes: Sequence[HandBox | tuple[float | str, ...]] | None = None,
    ) -> list[PredictedHand]:
        """The hands of a picture's file or of RGB pixels (H, W, 3) uint8.

        boxes: (x, y, width, height, "left" or "right") each, photo px; None: the detector finds them.
        Raises InputError for a picture or box that cannot be used, or where boxes are wanted and no detector is there.
        """
        picture = photo if isinstance(photo, np.ndarray) else read_photo(Path(photo))
        given = self.detect(picture) if boxes is None else [_as_box(box) for box in boxes]
        return self._hands(picture, given, focal_px=self._focal_px)

    def detect(self, picture: NDArray[np.uint8], *, thorough: bool = True) -> list[HandBox]:
        """What the detector finds in RGB pixels; its weights are read when it is first asked."""
        if self._detector is None:
            self._detector = load_hand_detector(self._detector_source)
        return self._detector(picture, thorough=thorough)


def load_predictor(
    network: str | Path = TEACHER,
    *,
    config: str | Path = "pipeline.yaml",
    mano_model: str | None = None,
    detector: str | Path | None = None,
    rescale: float = RESCALE,
    focal_px: float | None = None,
) -> Predictor:
    """A predictor by what `pipeline.networks.open_network` takes: a student's folder or name, a checkpoint, `teacher`.

    detector: the wheel of MediaPipe that has its weights; needed for pictures without boxes. rescale: boxes times this
    are seen. focal_px: of the camera; None: HaMeR's assumption.
    """
    named = open_network(str(network), Path(config), mano_model)
    return Predictor(named, None if detector is None else Path(detector), rescale, focal_px)


def _as_box(box: HandBox | tuple[float | str, ...]) -> HandBox:
    if isinstance(box, HandBox):
        return box
    what = f"the box {box}"
    if not 4 <= len(box) <= 5:
        raise InputError(f'{what}: want (x, y, width, height, "left" or "right")')
    try:
        x, y, width, height = (float(number) for number in box[:4])
    except ValueError:
        raise InputError(f"{what}: want x, y, width and height in pixels") from None
    return hand_box((x, y, width, height), *(str(side) for side in box[4:]), what=what)


def predict(request: PredictRequest) -> dict[str, Any]:
    """Predict all that is asked for and write the results; what `--json` prints.

    A file that cannot be used is named under its input, and the others go on; where only one was named, its error is
    raised. Raises InputError for what is wrong with the call itself, before any work.
    """
    photos = find_photos(request.paths)
    _check_numbers(request)
    boxes = _boxes(request, photos)
    for photo in photos:
        check_replaceable(request.out / (photo.name + RESULT_SUFFIX))
    predictor = load_predictor(
        request.network,
        config=request.config,
        mano_model=request.mano_model,
        detector=request.detector,
        rescale=request.rescale,
        focal_px=request.focal_px,
    )
    if boxes is None:
        predictor.detect(np.zeros((32, 32, 3), np.uint8))  # whether there is a detector: one error, not one a picture
    facts = {
        "network": str(predictor.named.source),
        "backbone": predictor.named.backbone,
        "rescale": request.rescale,
        "hands_from": "detector" if boxes is None else "boxes",
    }
    inputs = []
    with StageProgress("predict", len(photos), "files", quiet=len(photos) == 1) as progress:
        for photo in photos:
            given = None if boxes is None else boxes[photo.path]
            inputs.append(_one(predictor, photo, given, request, facts, alone=len(photos) == 1))
            progress.advance()
    _warn_of_dots(inputs)
    return {"ok": all(each["status"] != "failed" for each in inputs), **facts, "inputs": inputs}


def _warn_of_dots(inputs: Sequence[Mapping[str, Any]]) -> None:
    """Once, however many files there are."""
    found = [(Path(each["path"]).name, *_dots(each)) for each in inputs if each["status"] == "done"]
    shrunk = {name: dots for name, dots, _ in found if dots}
    if shrunk:
        log.warning(
            "%d of %d hands (in %s): the network shrank the hand to a dot, which is what one does that was trained too "
            "little to know which way it points; its joints and mesh there are of no use",
            sum(shrunk.values()),
            sum(count for *_, count in found),
            ", ".join(shrunk) if len(shrunk) <= 3 else f"{len(shrunk)} of {len(inputs)} files",
        )


def _dots(each: Mapping[str, Any]) -> tuple[int, int]:
    """How many of a file's hands are dots, and how many hands there are."""
    if each["kind"] == "video":
        return each["dots_total"], each["hands_total"]
    return sum(hand["is_dot"] for hand in each["hands"]), len(each["hands"])


def _check_numbers(request: PredictRequest) -> None:
    if not 0.1 <= request.rescale <= 10:
        raise InputError(f"--rescale: found {request.rescale:g}; want a factor of 0.1 to 10 (2 for tight boxes)")
    if request.focal_px is not None and not 1 <= request.focal_px <= 1e7:
        raise InputError(f"--focal-px: found {request.focal_px:g}; want the camera's focal length in pixels")


def _one(
    predictor: Predictor,
    photo: Photo,
    boxes: Sequence[HandBox] | None,
    request: PredictRequest,
    facts: Mapping[str, Any],
    *,
    alone: bool,
) -> dict[str, Any]:
    folder = request.out / (photo.name + RESULT_SUFFIX)
    about = {"path": str(photo.path), "kind": "video" if photo.is_video else "picture"}
    work = _video if photo.is_video else _picture
    try:
        document = work(predictor, photo.path, boxes, folder, facts, request.mesh)
    except InputError as error:
        if alone:
            raise
        log.warning("%s", error)
        return {**about, "status": "failed", "error": str(error), "folder": None}
    found = document["hands_total"] if photo.is_video else len(document["hands"])
    told = {key: value for key, value in document.items() if key != "conventions"}
    return {**about, "status": "done" if found else "no-hands", "error": None, "folder": str(folder), **told}


def _picture(
    predictor: Predictor,
    path: Path,
    boxes: Sequence[HandBox] | None,
    folder: Path,
    facts: Mapping[str, Any],
    mesh: MeshFormat,
) -> dict[str, Any]:
    picture = read_photo(path)
    hands = predictor(picture, boxes)
    size = {"width_px": picture.shape[1], "height_px": picture.shape[0]}
    return write_photo(folder, {"picture": path.name, **size, **facts}, hands, draw_hands(picture, hands), mesh)


def _video(
    predictor: Predictor,
    path: Path,
    boxes: Sequence[HandBox] | None,
    folder: Path,
    facts: Mapping[str, Any],
    _mesh: MeshFormat,
) -> dict[str, Any]:
    """Frame by frame; boxes that are given hold for every frame."""
    video = look_at_video(path)
    with result_folder(folder) as partial:
        files = VideoFiles(partial, video.frames_per_second)
        try:
            with StageProgress(path.name, video.frames, "frames") as progress:
                for frame in video_frames(path):
                    found = predictor.detect(frame, thorough=False) if boxes is None else boxes
                    hands = predictor(frame, found)
                    files.add(hands, draw_hands(frame, hands))
                    progress.advance()
        finally:
            files.close()
        if files.frames == 0:
            raise InputError(f"{path}: not one frame of it can be decoded")
        size = {"width_px": video.width, "height_px": video.height, "frames_per_second": video.frames_per_second}
        return files.finish({"video": path.name, **size, **facts})


def _boxes(request: PredictRequest, photos: Sequence[Photo]) -> Boxes | None:
    """The boxes of each file; None: the detector is asked."""
    if request.boxes and request.boxes_file is not None:
        raise InputError("--box and --boxes: give one of them")
    if request.boxes_file is not None:
        from pipeline.box_files import read_boxes

        return read_boxes(request.boxes_file, photos)
    if not request.boxes:
        return None
    if len(photos) != 1:
        raise InputError(
            f"--box: {len(photos)} files are named, and it is not said whose hand that is; name one, or give --boxes"
        )
    return {photos[0].path: request.boxes}


def predict_text(document: Mapping[str, Any]) -> str:
    """The same for a person."""
    rows = [row for each in document["inputs"] for row in _rows(each)]
    lines = [
        f"network: {document['network']} ({document['backbone']}); hands from the {document['hands_from']}",
        table(["file", "hand", "side", "score", "box (px)", "distance", "mesh"], rows),
    ]
    counts = {status: sum(each["status"] == status for each in document["inputs"]) for status in _SAID}
    files = len(document["inputs"])
    told = ", ".join(f"{count} {_SAID[status]}" for status, count in counts.items() if count)
    lines.append(f"{files} {'file' if files == 1 else 'files'}: {told}")
    return "\n".join(lines)


_SAID = {"done": "with hands", "no-hands": "without a hand", "failed": "failed"}


def _rows(each: Mapping[str, Any]) -> list[list[object]]:
    name = Path(each["path"]).name
    if each["status"] == "failed":
        return [[name, "", "", "", "", "", f"failed: {each['error']}"]]
    if each["kind"] == "video":
        what = f"{each['hands_total']} hands in {each['frames_with_hands']} of {each['frames']} frames"
        return [[name, "", "", "", "", "", f"{what}; {each['folder']}"]]
    if not each["hands"]:
        return [[name, "", "", "", "", "", "no hand found" if each["hands_from"] == "detector" else "no box given"]]
    return [_row(name, index, hand, str(each["folder"])) for index, hand in enumerate(each["hands"])]


def _row(name: str, index: int, hand: Mapping[str, Any], folder: str) -> list[object]:
    score = "" if hand["score"] is None else f"{hand['score']:.2f}"
    side = hand["side"] + (" (assumed)" if hand["side_from"] == "assumed" else "")
    box = " ".join(f"{number:.0f}" for number in hand["box"])
    distance = hand["camera"]["translation_m"][2]
    far = f"{distance:.1f} m" if hand["in_front"] and distance is not None else "behind the camera"
    far = "a dot" if hand["is_dot"] else far
    return [name, index, side, score, box, far, f"{folder}/{hand['mesh']}"]
