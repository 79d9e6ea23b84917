"""Calibrate: fit the constants of a pca or codes encoding to a teacher, on some of its tokens and before any shard.

The tokens are looked at once and never written: `job_tokens` keeps a few of each view, in half precision and in memory,
`fit` makes a codec of them. Both are plain functions. Shapes: n tokens, m views of a job, t tokens kept of each, C the
teacher's channels, k components, d the dimensions that codes are chosen in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.answers import Forward, run_padded
from stages.preparation import PreparedBatch, ShardJob
from storage.codecs import CODEBOOK_SIZE, INT8_LIMIT, CodesCodec, FittedCodec, PcaCodec, as_stored
from storage.config import encoding_parts, is_fitted
from storage.errors import InputError, WorkError

CALIBRATION_VERSION = 1
"""Of this algorithm; raised when the same tokens would give another codec."""

TOKENS = 131_072
"""At most so many are kept: 335 MB of 1280 channels in half precision, 1.2 GB at the peak of the fit. k-means needs
some 40 an entry of a codebook of 256, a covariance of 1280 channels some 10 a channel."""

HELD_OUT = 8
"""One view in so many is left out of the fit: on those the codec's error is measured."""

CODES_DIMENSIONS = (64, 256)
"""Codes of b bytes are chosen among the first 8 b principal components, within these limits: more dimensions than that
change the error by less than a hundredth (docs/decisions/007) and cost time in proportion."""

_BLOCK = 8192
"""Tokens that are turned to float32 at a time: 42 MB of 1280 channels."""

Tokens = NDArray[np.float16]


def tokens_a_view(views: int, grid_tokens: int) -> int:
    """How many tokens are kept of each of `views` views, so that there are at most about TOKENS of them."""
    return max(1, min(grid_tokens, TOKENS // views))


def check_channels(encoding: str, channels: int) -> None:
    """InputError when a teacher's features have too few channels for an encoding."""
    kind, number = encoding_parts(encoding)
    if kind == "pca" and number > channels:
        raise InputError(
            f"cache.features.encoding: {encoding} wants {number} components, but this teacher's features have "
            f"{channels} channels; set pca<k>-int8 with k below {channels}, or int8"
        )


@dataclass(frozen=True, eq=False)
class JobTokens:
    """What a teacher saw in a job."""

    tokens: Tokens
    """(m,t,C)"""
    provenance: Mapping[str, Any]
    """What only moves the last bits (`stages.teach.numerics`)."""


def job_tokens(
    job: ShardJob, batches: Iterable[PreparedBatch], forward: Forward, provenance: Mapping[str, Any], *, kept: int
) -> JobTokens:
    """`kept` of the teacher's tokens of each view of a job, on the stored grid, drawn by its sample's id.

    A view whose features are not finite, or beyond half precision, is left out.
    """
    found: list[Tokens] = []
    for batch in batches:
        if not batch.views:
            continue
        outputs = run_padded(forward, batch.pictures, job.settings.features.grid, job.settings.batch_size)
        for prepared, features_hwC in zip(batch.views, outputs["features"], strict=True):
            tokens_TC = features_hwC.reshape(-1, features_hwC.shape[-1])
            draw = np.random.default_rng([prepared.view, *prepared.sample_id.encode()])
            chosen = tokens_TC[np.sort(draw.permutation(len(tokens_TC))[:kept])]
            if np.abs(chosen).max() < np.finfo(np.float16).max:  # of NaN too this is False
                found.append(chosen.astype(np.float16))
    return JobTokens(np.stack(found) if found else np.empty((0, kept, 0), np.float16), provenance)


def fit(tokens_mtC: Tokens, encoding: str, seed: int) -> FittedCodec:
    """The codec of an encoding for a teacher with these tokens; the same tokens and seed give the same codec.

    Raises:
        InputError: the tokens have too few channels.
        WorkError: there are no tokens.
    """
    assert is_fitted(encoding), encoding
    if not len(tokens_mtC):
        raise WorkError("calibration found no view with finite features; the checkpoint is damaged, or no teacher")
    check_channels(encoding, tokens_mtC.shape[-1])
    held_out = np.arange(len(tokens_mtC)) % HELD_OUT == HELD_OUT - 1
    tokens_nC = np.concatenate(list(tokens_mtC[~held_out]))
    kind, number = encoding_parts(encoding)
    codec = _fit_pca(tokens_nC, number) if kind == "pca" else _fit_codes(tokens_nC, number, seed)
    tests_mtC = tokens_mtC[held_out] if held_out.any() else tokens_mtC
    return replace(codec, error=_relative_error(tests_mtC, codec))


def _fit_pca(tokens_nC: Tokens, k: int) -> PcaCodec:
    """One byte a component with a step of its own: nothing is clipped that calibration saw."""
    mean, components = principal_components(tokens_nC, k)
    largest = np.zeros(k, np.float32)
    for centred in _centred(tokens_nC, mean):
        np.maximum(largest, np.abs(centred @ components.T).max(axis=0), out=largest)
    largest[largest == 0] = 1  # of a teacher that says nothing
    return PcaCodec(mean, components, largest / np.float32(INT8_LIMIT), error=0.0)


def _fit_codes(tokens_nC: Tokens, b: int, seed: int) -> CodesCodec:
    """Codebook after codebook: k-means of what the ones before have left, in the space of the first components."""
    low, high = CODES_DIMENSIONS
    d = min(tokens_nC.shape[-1], max(low, min(8 * b, high)))
    mean, components = principal_components(tokens_nC, d)
    left_nd = np.concatenate([centred @ components.T for centred in _centred(tokens_nC, mean)])
    codebooks = np.empty((b, CODEBOOK_SIZE, d), np.float32)
    for place in range(b):
        codebooks[place], nearest = _k_means(left_nd, seed + place)
        left_nd -= codebooks[place][nearest]
    return CodesCodec(mean, components, codebooks, error=0.0)


def principal_components(tokens_nC: Tokens, k: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean (C,) and the first k principal directions (k,C) of tokens, largest variance first; signs are fixed."""
    mean = tokens_nC.mean(axis=0, dtype=np.float64).astype(np.float32)
    covariance = np.zeros((tokens_nC.shape[-1],) * 2)
    for centred in _centred(tokens_nC, mean):
        covariance += centred.T @ centred
    _, vectors = np.linalg.eigh(covariance)
    components = vectors[:, ::-1][:, :k].T
    heaviest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    return mean, np.ascontiguousarray(components * np.sign(heaviest), dtype=np.float32)


def _centred(tokens_nC: Tokens, mean: NDArray[np.float32]) -> Iterable[NDArray[np.float32]]:
    return (tokens_nC[start : start + _BLOCK] - mean for start in range(0, len(tokens_nC), _BLOCK))


def _k_means(points_nd: NDArray[np.float32], seed: int) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """A codebook (256,d) for the points, and which entry is nearest to each. On one thread: the same sums every time.

    It is found in the first few principal dimensions, then in more: from random rows in all of them at once, k-means
    ends up 5% worse (docs/decisions/007).
    """
    import faiss

    threads, d = faiss.omp_get_max_threads(), points_nd.shape[1]
    faiss.omp_set_num_threads(1)
    try:
        enough = np.resize(points_nd, (max(len(points_nd), CODEBOOK_SIZE), d))  # repeated, in a smoke run
        few_points_are_fine = {"min_points_per_centroid": 1, "max_points_per_centroid": TOKENS // CODEBOOK_SIZE}
        k_means = faiss.Kmeans(d, CODEBOOK_SIZE, niter=10, seed=seed, progressive_dim_steps=4, **few_points_are_fine)
        k_means.train(enough)
        codebook = np.asarray(k_means.centroids, np.float32)
        _, nearest = faiss.knn(points_nd, codebook, 1)
    finally:
        faiss.omp_set_num_threads(threads)
    return codebook, nearest[:, 0]


def _relative_error(tokens_mtC: Tokens, codec: FittedCodec) -> float:
    """Of whole views, Euclidean norms: the mean of |stored - seen| / |seen|."""
    seen_mtC = tokens_mtC.astype(np.float32)
    back_mtC = as_stored(seen_mtC[:, None], codec)[:, 0]
    norms = np.linalg.norm(seen_mtC, axis=(1, 2))
    errors = np.linalg.norm(back_mtC - seen_mtC, axis=(1, 2)) / np.where(norms > 0, norms, 1)
    return float(errors.mean())
