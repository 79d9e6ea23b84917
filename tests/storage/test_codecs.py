from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from storage.codecs import (
    CODEC_FILE,
    CodesCodec,
    Float16Codec,
    Int8Codec,
    PcaCodec,
    as_stored,
    codec_bytes,
    open_codec,
    read_codec,
)
from storage.config import encoding_parts, token_bytes
from storage.durable import sha256_bytes
from storage.errors import DamageError
from tests.tiny_cache import tiny_codec

FITTED = ["pca6-int8", "codes3"]


def features(shape: tuple[int, ...] = (5, 8, 6, 24), seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


@given(hnp.arrays(np.float32, (1, 2, 2, 5), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)))
def test_int8_is_within_half_a_step_of_each_token(values: NDArray[np.float32]) -> None:
    step = np.abs(values).max(axis=-1, keepdims=True) / 127
    assert (np.abs(as_stored(values, Int8Codec()) - values) <= step * 0.5001 + 1e-30).all()


def test_int8_of_nothing_is_nothing() -> None:
    assert (as_stored(np.zeros((1, 8, 8, 4), np.float32), Int8Codec()) == 0).all()


def test_float16_is_numpys() -> None:
    np.testing.assert_array_equal(as_stored(features(), Float16Codec()), features().astype(np.float16).astype("f4"))


def test_what_cannot_be_stored_is_known() -> None:
    codecs = [Float16Codec(), Int8Codec(), *(tiny_codec(encoding, 4) for encoding in ("pca2-int8", "codes2"))]
    values = np.ones((8, 8, 4), np.float32)
    assert [codec.representable(values) for codec in codecs] == [True] * 4
    values[0, 0, 0] = 1e5
    assert [codec.representable(values) for codec in codecs] == [False, True, True, True]
    for bad in (np.nan, np.inf):
        values[0, 0, 0] = bad
        assert [codec.representable(values) for codec in codecs] == [False] * 4


def test_pca_stores_the_nearest_step_of_each_component_and_clips_beyond() -> None:
    codec = tiny_codec("pca6-int8", 24)
    assert isinstance(codec, PcaCodec)
    values = features() * 3
    stored, scale = codec.encode(values)
    wanted = (values.astype("f8") - codec.mean) @ codec.components.astype("f8").T / codec.scale
    assert (stored.dtype, stored.shape, scale) == (np.dtype(np.int8), (5, 8, 6, 6), None)
    assert np.abs(stored - np.clip(wanted, -127, 127)).max() < 0.501
    assert stored.min() == -127
    assert stored.max() == 127
    np.testing.assert_allclose(
        as_stored(values, codec), (stored * codec.scale.astype("f8")) @ codec.components + codec.mean, atol=1e-5
    )


def test_all_components_in_fine_steps_are_the_values() -> None:
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(24, 24)))[0].astype(np.float32)
    codec = PcaCodec(np.zeros(24, np.float32), directions, np.full(24, 0.05, np.float32), error=0.0)
    assert np.abs(as_stored(features(), codec) - features()).max() < 0.025 * np.sqrt(24)


def test_each_code_names_the_row_nearest_to_what_is_left() -> None:
    codec = tiny_codec("codes3", 24)
    assert isinstance(codec, CodesCodec)
    stored, scale = codec.encode(features())
    assert (stored.dtype, stored.shape, scale) == (np.dtype(np.uint8), (5, 8, 6, 3), None)
    left = (features().astype("f8") - codec.mean) @ codec.components.astype("f8").T
    for place, codebook in enumerate(codec.codebooks.astype("f8")):
        distances = np.square(left[..., None, :] - codebook).sum(-1)
        chosen = np.take_along_axis(distances, stored[..., place, None].astype(int), -1)[..., 0]
        np.testing.assert_allclose(chosen, distances.min(-1), rtol=1e-4, atol=1e-4)
        left -= codebook[stored[..., place]]
    projected = (features().astype("f8") - codec.mean) @ codec.components.T - left
    np.testing.assert_allclose(as_stored(features(), codec), projected @ codec.components + codec.mean, atol=1e-4)


@pytest.mark.parametrize("encoding", FITTED)
def test_a_views_bytes_do_not_depend_on_its_neighbours(encoding: str) -> None:
    codec = tiny_codec(encoding, 24)
    together = codec.encode(features())[0]
    alone = [codec.encode(features()[view : view + 1])[0][0] for view in range(5)]
    assert together.tobytes() == np.stack(alone).tobytes()


@pytest.mark.parametrize("encoding", FITTED)
def test_a_record_decodes_as_in_a_batch(encoding: str) -> None:
    codec = tiny_codec(encoding, 24)
    stored, _ = codec.encode(features())
    one = np.empty((8, 6, 24), np.float32)
    codec.decode(stored[2], None, one)
    np.testing.assert_allclose(one, as_stored(features(), codec)[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("encoding", "channels", "size"), [("float16", 24, 48), ("int8", 24, 28), ("pca6-int8", 24, 6)]
)
def test_token_bytes_are_those_of_the_stored_arrays(encoding: str, channels: int, size: int) -> None:
    codec = Float16Codec() if encoding == "float16" else Int8Codec() if encoding == "int8" else tiny_codec(encoding, 24)
    stored, scale = codec.encode(features((1, 1, 1, channels)))
    assert stored.nbytes + (0 if scale is None else scale.nbytes) == size == token_bytes(encoding, channels)
    assert codec.channels(stored.shape[-1]) == channels
    assert token_bytes("codes16", 1280) == 16


@pytest.mark.parametrize("encoding", FITTED)
def test_a_codecs_file_is_its_content(encoding: str) -> None:
    codec = tiny_codec(encoding, 24)
    again = read_codec(encoding, codec_bytes(codec))
    assert codec_bytes(again) == codec_bytes(codec)
    assert (again.error, again.channels(encoding_parts(encoding)[1])) == (0.5, 24)
    np.testing.assert_array_equal(again.encode(features())[0], codec.encode(features())[0])


@pytest.mark.parametrize("other", ["pca6-int8", "pca5-int8", "codes3", "codes2"])
@pytest.mark.parametrize("encoding", FITTED)
def test_another_encodings_file_is_refused(encoding: str, other: str) -> None:
    if other != encoding:
        with pytest.raises(ValueError, match="codec of"):
            read_codec(encoding, codec_bytes(tiny_codec(other, 24)))


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "another"])
def test_a_codec_that_the_identity_does_not_name_is_damage(tmp_path: Path, how: str) -> None:
    data = codec_bytes(tiny_codec("codes3", 24))
    named = {"encoding": "codes3", "codec_sha256": sha256_bytes(data)}
    (tmp_path / CODEC_FILE).write_bytes(data)
    assert codec_bytes(open_codec(tmp_path, named)) == data  # type: ignore[arg-type]  # a fitted one
    broken = {"flipped": data[:-1] + b"\xff", "cut": data[:-1], "another": codec_bytes(tiny_codec("codes3", 25))}
    (tmp_path / CODEC_FILE).unlink()
    if how in broken:
        (tmp_path / CODEC_FILE).write_bytes(broken[how])
    with pytest.raises(DamageError, match=r"codec\.safetensors is damaged"):
        open_codec(tmp_path, named)


@pytest.mark.parametrize(
    ("encoding", "parts"),
    [("float16", ("float16", 0)), ("int8", ("int8", 0)), ("pca128-int8", ("pca", 128)), ("codes64", ("codes", 64))],
)
def test_the_forms_of_an_encoding(encoding: str, parts: tuple[str, int]) -> None:
    assert encoding_parts(encoding) == parts


@pytest.mark.parametrize(
    "encoding", ["", "int4", "pca-int8", "pca0-int8", "pca64", "codes0", "codes65", "int8\n", "INT8"]
)
def test_anything_else_is_no_encoding(encoding: str) -> None:
    with pytest.raises(ValueError, match=r"want float16, int8, pca<k>-int8 .* or codes<b>"):
        encoding_parts(encoding)
