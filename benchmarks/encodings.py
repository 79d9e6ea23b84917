"""Bytes, error and speed of every way to store a teacher's features: those the cache offers and those it does not.

    python benchmarks/encodings.py [--quick] [--json FILE]

Error: the demo's teacher (192 channels, grid 8x8-paper) looks at synthesised hands; codecs are fitted to some, and
measured on others and, where ../shared/data/real-hands is there, on hands in real photographs. Relative error is that
of all tokens together (Frobenius), cosine the mean of the tokens'. `tried` marks what the cache does not offer.
Speed: also at HaMeR's 1280 channels, where values and codecs are random numbers: that changes no time. One thread; on a
machine with a GPU decoding is timed there too, with the training's own decoder. Ways take turns, the best turn counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from picture_codecs import answers, demo_teacher, real_views, synthesised_views

from stages.calibrate import fit, principal_components, tokens_a_view
from storage.codecs import CODEBOOK_SIZE, Codec, CodesCodec, Float16Codec, Int8Codec, PcaCodec, as_stored
from storage.config import encoding_parts, token_bytes
from trainer.features import feature_decoder

TOKENS = 64
"""Of the grid 8x8-paper."""
HAMER_CHANNELS = 1280
DEMO = ("float16", "int8", "pca64-int8", "pca128-int8", "pca192-int8", "codes4", "codes8", "codes16", "codes32")
HAMER = ("float16", "int8", "pca64-int8", "pca128-int8", "pca256-int8", "codes4", "codes8", "codes16", "codes32")
QUICK = ("float16", "int8", "pca64-int8", "codes4", "codes16")

Floats = NDArray[np.float32]
Row = tuple[str, float, str]


@dataclass(frozen=True)
class Tried:
    """A way that the cache does not offer: tokens (n,C) there and back."""

    name: str
    bytes_a_token: int
    through: Callable[[Floats], Floats]


def fitted(encoding: str, tokens_mtC: NDArray[np.float16]) -> Codec:
    """The codec of an encoding, fitted where it has to be."""
    if encoding == "float16":
        return Float16Codec()
    return Int8Codec() if encoding == "int8" else fit(tokens_mtC, encoding, 0)


def tried_scales(seen_nC: Floats) -> Iterator[Tried]:
    """Other steps for a byte a value: of int8's channels and of pca's components."""
    channels = np.abs(seen_nC).max(axis=0) / 127
    yield Tried("int8, calibrated scale a channel", len(channels), lambda t: _rounded(t, channels))
    for k in (64, 128):
        mean, basis = principal_components(seen_nC.astype(np.float16), k)
        projected = (seen_nC - mean) @ basis.T
        deviation, largest = projected.std(axis=0), np.abs(projected).max() / 127

        def scaled(t: Floats, m: Floats = mean, b: Floats = basis, s: Any = 1.0) -> Floats:
            z = (t - m) @ b.T / s
            return (_rounded(z, np.abs(z).max(axis=1, keepdims=True) / 127) * s) @ b + m

        def one_step(t: Floats, m: Floats = mean, b: Floats = basis, s: Any = largest) -> Floats:
            return _rounded((t - m) @ b.T, s) @ b + m

        yield Tried(f"pca{k}, a scale a token", k + 4, scaled)
        yield Tried(f"pca{k}, whitened, a scale a token", k + 4, lambda t, f=scaled, s=deviation: f(t, s=s))
        yield Tried(f"pca{k}, one scale", k, one_step)
        yield Tried(f"pca{k}, not rounded", 4 * k, lambda t, m=mean, b=basis: (t - m) @ b.T @ b + m)


def _rounded(values: Floats, step: Any) -> Floats:
    return np.clip(np.rint(values / step), -127, 127) * step


def _quiet(parameters: Any) -> None:
    """faiss warns of few points on the standard error, a line each time."""
    parameters.min_points_per_centroid = 1


def tried_codes(seen_nC: Floats, b: int) -> Iterator[Tried]:
    """Other quantisers of b bytes, all by faiss."""
    for d in (64, 128):
        mean, basis = principal_components(seen_nC.astype(np.float16), d)
        yield _product(f"codes{b}: PCA to {d}, product quantisation", seen_nC, b, mean, basis)
    opq = faiss.OPQMatrix(seen_nC.shape[1], b, 64)
    opq.niter = 20
    opq.pq = (quiet := faiss.ProductQuantizer(64, b, 8))
    _quiet(quiet.cp)
    mean = seen_nC.mean(axis=0)
    opq.train(np.ascontiguousarray((seen_nC - mean)[:20_000]))
    turned = faiss.vector_to_array(opq.A).reshape(64, -1)
    yield _product(f"codes{b}: OPQ to 64, product quantisation", seen_nC, b, mean, turned)
    for beam in (1, 5):
        mean, basis = principal_components(seen_nC.astype(np.float16), 64)
        quantiser = faiss.ResidualQuantizer(64, b, 8)
        quantiser.max_beam_size = beam
        _quiet(quantiser.cp)
        quantiser.train_type = faiss.ResidualQuantizer.Train_default
        quantiser.train(np.ascontiguousarray((seen_nC - mean) @ basis.T))
        yield _through(f"codes{b}: PCA to 64, residual quantisation, beam {beam}", quantiser, b, mean, basis)


def _product(name: str, seen_nC: Floats, b: int, mean: Floats, basis_dC: Floats) -> Tried:
    quantiser = faiss.ProductQuantizer(len(basis_dC), b, 8)
    _quiet(quantiser.cp)
    quantiser.train(np.ascontiguousarray((seen_nC - mean) @ basis_dC.T))
    return _through(name, quantiser, b, mean, basis_dC)


def _through(name: str, quantiser: Any, b: int, mean: Floats, basis_dC: Floats) -> Tried:
    def through(tokens_nC: Floats) -> Floats:
        codes = quantiser.compute_codes(np.ascontiguousarray((tokens_nC - mean) @ basis_dC.T))
        return quantiser.decode(codes) @ basis_dC + mean

    return Tried(name, b, through)


def errors(name: str, sets: dict[str, Floats], through: Callable[[Floats], Floats]) -> Iterator[Row]:
    """Relative error and mean cosine of tokens (n,C) that were not fitted to."""
    for which, tokens_nC in sets.items():
        back = through(tokens_nC)
        norms = np.linalg.norm(back, axis=1) * np.linalg.norm(tokens_nC, axis=1)
        yield (
            f"{name}, {which}",
            float(np.linalg.norm(back - tokens_nC) / np.linalg.norm(tokens_nC)),
            "relative error",
        )
        yield f"{name}, {which}", float(((back * tokens_nC).sum(axis=1) / norms).mean()), "mean cosine"


def random_codec(encoding: str, channels: int) -> Codec:
    """A codec of the right shapes, for its speed alone."""
    kind, number = encoding_parts(encoding)
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Floats:
        return rng.normal(size=shape).astype(np.float32)

    if kind == "pca":
        return PcaCodec(normal(channels), normal(number, channels), np.abs(normal(number)) + 1, error=0.0)
    if kind == "codes":
        d = min(channels, max(64, min(8 * number, 256)))
        return CodesCodec(normal(channels), normal(d, channels), normal(number, CODEBOOK_SIZE, d), error=0.0)
    return Float16Codec() if kind == "float16" else Int8Codec()


def speeds(names: Iterable[str], features_BhwC: Floats, turns: int) -> Iterator[Row]:
    """Views a second, encoded and decoded by numpy, and decoded by torch on each device that is there."""
    channels = features_BhwC.shape[-1]
    codecs = {name: random_codec(name, channels) for name in names}
    best: dict[tuple[str, str], float] = {}
    for _ in range(turns + 1):
        for name, codec in codecs.items():
            for what, seconds in _one_turn(codec, features_BhwC):
                best[name, what] = max(best.get((name, what), 0.0), len(features_BhwC) / seconds)
    for (name, what), rate in best.items():
        yield f"{name}, C = {channels}, {what}", rate, "views/s"


def _one_turn(codec: Codec, features_BhwC: Floats) -> Iterator[tuple[str, float]]:
    started = time.perf_counter()
    stored, scale = codec.encode(features_BhwC)
    yield "encode", time.perf_counter() - started
    out = np.empty_like(features_BhwC)
    started = time.perf_counter()
    for view in range(len(stored)):  # one by one, as a reader does
        codec.decode(stored[view], None if scale is None else scale[view], out[view])
    yield "decode", time.perf_counter() - started
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        decoder = feature_decoder(codec).to(device)
        held = [None if array is None else torch.from_numpy(array).to(device) for array in (stored, scale)]
        _synchronise(device)
        started = time.perf_counter()
        decoder(*held).contiguous()
        _synchronise(device)
        yield f"decode with torch, {device}", time.perf_counter() - started


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def report(quick: bool) -> dict[str, Any]:
    """Measure, and say it in the layout that all benchmarks share."""
    forward = demo_teacher()
    calibration = answers(forward, synthesised_views(30 if quick else 400, seed=11, views=3))["features"]
    unseen = {"synthesised": answers(forward, synthesised_views(16 if quick else 100, seed=12, views=2))["features"]}
    photographs = real_views(1 if quick else 3)
    if photographs is not None:
        unseen["real"] = answers(forward, photographs)["features"]
    channels = calibration.shape[-1]
    sets = {name: features.reshape(-1, channels) for name, features in unseen.items()}
    tokens = calibration.reshape(len(calibration), TOKENS, channels).astype(np.float16)
    tokens = tokens[:, : tokens_a_view(len(tokens), TOKENS)]
    rows: list[Row] = []
    for encoding in QUICK if quick else DEMO:
        started = time.perf_counter()
        codec = fitted(encoding, tokens)
        rows += [(f"{encoding}, fit", time.perf_counter() - started, "s")] * (codec.error > 0)
        rows += errors(encoding, sets, lambda t, codec=codec: as_stored(t[:, None, None], codec)[:, 0, 0])
        rows.append((f"{encoding}, C = {channels}", token_bytes(encoding, channels) * TOKENS, "bytes a view"))
        rows.append(
            (f"{encoding}, C = {HAMER_CHANNELS}", token_bytes(encoding, HAMER_CHANNELS) * TOKENS, "bytes a view")
        )
    seen_nC = tokens.reshape(-1, channels).astype(np.float32)
    for way in (
        *tried_scales(seen_nC),
        *(way for b in ((16,) if quick else (8, 16)) for way in tried_codes(seen_nC, b)),
    ):
        rows += errors(f"tried: {way.name}", sets, way.through)
        rows.append((f"tried: {way.name}, C = {channels}", way.bytes_a_token * TOKENS, "bytes a view"))
    turns = 1 if quick else 5
    rows += speeds(QUICK if quick else DEMO, unseen["synthesised"][:64], turns)
    noise = np.random.default_rng(0).normal(size=(16 if quick else 64, 8, 8, HAMER_CHANNELS)).astype(np.float32)
    rows += speeds(QUICK if quick else HAMER, noise, turns)
    return _document(rows, {name: len(features) for name, features in unseen.items()}, len(tokens))


def _document(rows: list[Row], views: dict[str, int], calibrated: int) -> dict[str, Any]:
    values = {(what, unit): value for what, value, unit in rows}
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    pictures = ", ".join(f"{count} {name}" for name, count in views.items())

    def over(ours: str, other: str) -> float:
        unit = "relative error"
        return round(values[f"{ours}, synthesised", unit] / values[f"{other}, synthesised", unit], 3)

    return {
        "name": "encodings",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread{gpu}; "
        f"fitted to {calibrated} synthesised views, measured on {pictures}; speeds at C = 1280 with random values",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rows": [{"what": what, "value": float(f"{value:.5g}"), "unit": unit} for what, value, unit in rows],
        "ratios": {
            "int8_over_calibrated_int8_error": over("int8", "tried: int8, calibrated scale a channel"),
            "pca64_over_unrounded_error": over("pca64-int8", "tried: pca64, not rounded"),
            "codes16_over_opq_error": over("codes16", "tried: codes16: OPQ to 64, product quantisation"),
            "codes16_over_beam_error": over("codes16", "tried: codes16: PCA to 64, residual quantisation, beam 5"),
            "float16_over_codes16_bytes": token_bytes("float16", HAMER_CHANNELS) / 16,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    text = json.dumps(report(arguments.quick), indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
