from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from storage.cache import open_cache
from storage.config import FeatureEncoding
from tests.tiny_cache import write_tiny_cache
from tests.trainer.jobs import tiny_job
from trainer.data import FEATURES, FEATURES_SCALE
from trainer.features import feature_decoder
from trainer.loop import train

ENCODINGS = ["float16", "int8", "pca12-int8", "codes4"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_features_decode_where_they_train_as_they_do_in_numpy(tmp_path: Path, encoding: FeatureEncoding) -> None:
    reader = open_cache(write_tiny_cache(tmp_path, n=6, encoding=encoding, channels=40))
    rows, views = [0, 3, 5, 5], [2, 1, 0, 2]
    stored = reader.read(rows, views, [FEATURES], decoded=False)
    scale = torch.from_numpy(stored[FEATURES_SCALE]) if FEATURES_SCALE in stored else None
    found_BCHW = feature_decoder(reader.codec)(torch.from_numpy(stored[FEATURES]), scale)
    wanted_BHWC = reader.read(rows, views, [FEATURES])[FEATURES]
    assert found_BCHW.dtype == torch.float32
    difference = np.linalg.norm(found_BCHW.permute(0, 2, 3, 1).numpy() - wanted_BHWC)
    assert difference <= 1e-6 * np.linalg.norm(wanted_BHWC)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_decodes_is_not_learnt_and_not_saved(tmp_path: Path, encoding: FeatureEncoding) -> None:
    reader = open_cache(write_tiny_cache(tmp_path, n=3, encoding=encoding))
    decoder = feature_decoder(reader.codec)
    assert list(decoder.parameters()) == []
    assert decoder.state_dict() == {}
    constants = dict(decoder.named_buffers())
    assert bool(constants) == encoding.startswith(("pca", "codes"))
    moved = decoder.to(torch.device("meta"))
    assert all(buffer.is_meta for buffer in moved.buffers())


@pytest.mark.parametrize("encoding", ["float16", "pca12-int8", "codes4"])
def test_a_student_learns_from_every_encoding(tmp_path: Path, encoding: FeatureEncoding) -> None:
    job = tiny_job(tmp_path, encoding=encoding, distill={"features": 1.8}, steps=2)
    result = train(job)
    assert result.steps == 2
    assert np.isfinite(result.validation["loss"])
