from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from stages.calibrate import TOKENS, fit, job_tokens, principal_components, tokens_a_view
from stages.preparation import prepared_batches
from storage.codecs import CodesCodec, PcaCodec, as_stored, codec_bytes
from storage.errors import InputError, WorkError
from tests.stages.teaching import PROVENANCE, forward, jobs, settings, write_data

LOADINGS = np.random.default_rng(0).normal(0, 1, (6, 24)) * 0.7 ** np.arange(6)[:, None] * 3


def tokens(views: int = 160, kept: int = 16, noise: float = 0.05, seed: int = 1) -> NDArray[np.float16]:
    """Tokens of a teacher with six things to say and a little noise, around a mean."""
    rng = np.random.default_rng(seed)
    said = rng.normal(0, 1, (views, kept, 6)) @ LOADINGS
    return (said + rng.normal(0, noise, (views, kept, 24)) + np.linspace(-2, 2, 24)).astype(np.float16)


def relative_error(codec: PcaCodec | CodesCodec, seen: NDArray[np.float16]) -> float:
    """Of all tokens together."""
    wanted = seen.astype(np.float32)[:, None]
    return float(np.linalg.norm(as_stored(wanted, codec) - wanted) / np.linalg.norm(wanted))


def test_principal_components_are_those_of_the_singular_values() -> None:
    seen = tokens().reshape(-1, 24)
    mean, components = principal_components(seen, 6)
    np.testing.assert_allclose(mean, seen.astype("f8").mean(0), atol=1e-5)
    np.testing.assert_allclose(components @ components.T, np.eye(6), atol=1e-5)
    wanted = np.linalg.svd(seen.astype("f8") - seen.astype("f8").mean(0), full_matrices=False)[2][:6]
    np.testing.assert_allclose(np.abs(np.sum(components * wanted, axis=1)), 1, atol=1e-5)


def test_pca_finds_what_the_teacher_says_and_clips_nothing_that_it_saw() -> None:
    codec = fit(tokens(), "pca6-int8", 0)
    assert isinstance(codec, PcaCodec)
    assert relative_error(codec, tokens(seed=2)) < 0.03
    stored, _ = codec.encode(tokens().astype(np.float32)[:, None])
    assert np.abs(stored.reshape(-1, 6)).max(axis=0).tolist() == [127] * 6
    fewer = fit(tokens(), "pca3-int8", 0)
    assert relative_error(fewer, tokens(seed=2)) > 5 * relative_error(codec, tokens(seed=2))


def test_more_codes_are_nearer_and_the_error_is_that_of_views_not_seen() -> None:
    codecs = [fit(tokens(), f"codes{number}", 0) for number in (1, 2, 4)]
    errors = [relative_error(codec, tokens(seed=2)) for codec in codecs]
    assert errors[0] > 1.4 * errors[1] > 1.4**2 * errors[2]
    for codec, error in zip(codecs, errors, strict=True):
        assert codec.error == pytest.approx(error, rel=0.15)
    assert errors[2] < 0.15


@pytest.mark.parametrize("encoding", ["pca6-int8", "codes2"])
def test_the_same_tokens_and_seed_give_the_same_codec(encoding: str) -> None:
    first = codec_bytes(fit(tokens(40), encoding, 0))
    threads = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(2)
        assert codec_bytes(fit(tokens(40), encoding, 0)) == first
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(threads)
    assert (codec_bytes(fit(tokens(40), encoding, 1)) == first) == encoding.startswith("pca")
    assert codec_bytes(fit(tokens(41), encoding, 0)) != first


def test_one_view_of_few_tokens_is_enough_for_a_smoke_run() -> None:
    codec = fit(tokens(1), "codes2", 0)
    assert codec.error < 1e-3, "sixteen tokens have a row each"


def test_a_teacher_that_says_nothing_can_be_stored() -> None:
    nothing = np.zeros((16, 4, 24), np.float16)
    for encoding in ("pca6-int8", "codes2"):
        codec = fit(nothing, encoding, 0)
        assert (as_stored(nothing.astype(np.float32)[:, None], codec) == 0).all()


def test_what_cannot_be_fitted_is_said() -> None:
    with pytest.raises(InputError, match=r"pca25-int8 wants 25 components, .* 24 channels"):
        fit(tokens(), "pca25-int8", 0)
    with pytest.raises(WorkError, match="no view with finite features"):
        fit(np.empty((0, 4, 0), np.float16), "codes2", 0)


@pytest.mark.parametrize(("views", "kept"), [(1, 64), (2048, 64), (4096, 32), (10**6, 1)])
def test_memory_is_bounded(views: int, kept: int) -> None:
    assert tokens_a_view(views, 64) == kept
    assert views * kept <= max(TOKENS, views)


def test_a_jobs_tokens_are_those_of_its_views_whatever_the_job(tmp_path: Path) -> None:
    table = write_data(tmp_path)
    work = pickle.loads(pickle.dumps(partial(job_tokens, kept=5)))  # noqa: S301  as Ray sends it
    together, apart = (
        [
            work(job, prepared_batches(job), forward, PROVENANCE).tokens
            for job in jobs(tmp_path, tmp_path, table, settings(), n)
        ]
        for n in (100, 1)
    )
    assert [part.shape for part in together] == [(8, 5, 3)]
    np.testing.assert_array_equal(np.concatenate([part for part in apart if len(part)]), together[0])
    (job,) = jobs(tmp_path, tmp_path, table, settings(), 100)
    seen = [forward(_padded(batch.pictures), "8x6-geometric")["features"] for batch in prepared_batches(job)]
    everything = np.concatenate(seen)[:8].reshape(8, 48, 3).astype(np.float16)
    for view, kept in zip(everything, together[0], strict=True):
        assert {token.tobytes() for token in kept} <= {token.tobytes() for token in view}


def test_a_view_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    (job,) = jobs(tmp_path, tmp_path, write_data(tmp_path), settings(), 100)

    def broken(pictures: NDArray[np.uint8], grid: object) -> dict[str, NDArray[np.float32]]:
        outputs = dict(forward(pictures, "8x6-geometric"))
        outputs["features"] = outputs["features"].copy()
        outputs["features"][1] = np.nan
        outputs["features"][2] = 1e5
        return outputs

    seen = job_tokens(job, prepared_batches(job), broken, PROVENANCE, kept=4)
    assert seen.tokens.shape == (3, 4, 3), "eight views in batches of three: two of each are not to be used"
    assert seen.provenance == PROVENANCE


def _padded(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([pictures, np.zeros((3 - len(pictures), 256, 256, 3), np.uint8)])
