"""Foreign pickles: what numpy writes comes back, everything else is refused by name and runs nothing."""

from __future__ import annotations

import collections
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.errors import InputError
from storage.pickle_scan import MalformedPickleError, check_pickle
from storage.unpickling import (
    NUMPY_GLOBALS,
    PLAIN_GLOBALS,
    Inert,
    RestrictedUnpickler,
    UnsafePickleError,
    inert_class,
    load_annotations,
    load_restricted,
    plain,
)
from tests import hostile_pickles

VALUES: list[Any] = [
    np.arange(12.0).reshape(3, 4).T,
    np.zeros((0, 3), np.float32),
    np.array(3.5),
    np.array({"reprojection_loss": 3.0}),
    np.array(["a", "bc"]),
    np.array([b"x", b""]),
    np.array([None, "x"], object),
    np.arange(3, dtype=">i4"),
    np.float32(3),
    np.float64(-1e300),
    np.bool_(True),
    b"",
    b"\x00\xff",
    {"nested": [1, (2.5, None)]},
    "text",
    7,
]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}-{value}"[:40])
def test_annotations_come_back_as_pickle_gives_them(protocol: int, value: Any) -> None:
    data = pickle.dumps([{"value": value}], protocol=protocol)
    read, wanted = load_annotations(data, "it")[0]["value"], pickle.loads(data)[0]["value"]  # noqa: S301  # our own
    assert type(read) is type(wanted)
    if isinstance(wanted, np.ndarray):
        assert (read.dtype, read.shape) == (wanted.dtype, wanted.shape)
        assert read.tolist() == wanted.tolist()
    else:
        assert read == wanted


@pytest.mark.parametrize("name", hostile_pickles.NAMES)
@pytest.mark.parametrize("read", [load_annotations, lambda data, what: _load_all(data, what)])
def test_hostile_pickles_are_refused_and_run_nothing(name: str, read: Any, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    environment = dict(os.environ)
    with pytest.raises(InputError, match=r"^hostile\.pkl: "):
        read(hostile_pickles.every_one(marker)[name], "hostile.pkl")
    assert not marker.exists()
    assert dict(os.environ) == environment


def _load_all(data: bytes, what: str) -> Any:
    """With the widest table that anything here is read with."""
    return load_restricted(data, allowed={**NUMPY_GLOBALS, **PLAIN_GLOBALS}, what=what, encoding="latin1")


def test_there_are_more_than_twenty_of_them_that_would_run_something() -> None:
    assert len(hostile_pickles.running(Path("marker"))) >= 20


@pytest.mark.parametrize("name", ["os.system", "eval", "subprocess.run"])
def test_they_are_not_blanks(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    pickle.loads(hostile_pickles.running(marker)[name])  # noqa: S301  # proves that the tests above can fail
    assert marker.exists()


def test_the_refused_name_is_named() -> None:
    with pytest.raises(UnsafePickleError, match=r"posix\.system|os\.system"):
        load_annotations(hostile_pickles.running(Path("marker"))["os.system"], "hostile.pkl")


def test_constructors_are_whole_after_attempts_on_them() -> None:
    for data in hostile_pickles.corrupting().values():
        with pytest.raises(InputError):
            _load_all(data, "it")
    assert load_annotations(pickle.dumps([{"a": np.float32(2)}]), "it") == [{"a": 2}]


class _Config(dict):  # type: ignore[type-arg]
    """Stands for a class that the reader does not have."""


class _Thing:
    pass


@pytest.mark.parametrize("protocol", range(6))
def test_foreign_objects_become_records(protocol: int) -> None:
    config, thing = _Config(a=1, b=_Config(c=2)), _Thing()
    thing.array = np.arange(3)  # type: ignore[attr-defined]
    config.note = "x"  # type: ignore[attr-defined]
    data = pickle.dumps({"config": config, "thing": thing, "more": collections.OrderedDict(z=1)}, protocol=protocol)
    stand_ins = {(__name__, name): inert_class(__name__, name) for name in ("_Config", "_Thing")}
    read = load_restricted(data, allowed={**NUMPY_GLOBALS, **PLAIN_GLOBALS, **stand_ins}, what="it", encoding="latin1")
    assert isinstance(read["config"], Inert)
    entries = read["config"].entries or dict(read["config"].arguments[0] if read["config"].arguments else {})
    assert read["config"].state == {"note": "x"}
    if protocol >= 2:
        assert entries["a"] == 1
        assert entries["b"].entries == {"c": 2}
    assert plain(read["thing"].state)["array"].tolist() == [0, 1, 2]
    assert read["more"] == {"z": 1}


def test_arrays_are_made_ordinary() -> None:
    data = pickle.dumps({"a": [np.arange(2), (np.arange(3),)]})
    read = plain(load_restricted(data, allowed=NUMPY_GLOBALS, what="it"))
    assert type(read["a"][0]) is type(read["a"][1][0]) is np.ndarray


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], "text", [{"a": 1}, None]])
def test_annotations_are_lists_of_dictionaries(content: Any) -> None:
    with pytest.raises(InputError, match=r"it: found .*, wanted a list of dictionaries"):
        load_annotations(pickle.dumps(content), "it")


def test_the_reader_takes_files() -> None:
    file = io.BytesIO(pickle.dumps(np.arange(3)))
    assert RestrictedUnpickler(file, allowed=NUMPY_GLOBALS, what="it").load().tolist() == [0, 1, 2]


def test_the_scan_accepts_all_that_pickle_writes() -> None:
    recursive: list[Any] = [1]
    recursive.append((recursive, {"a": recursive}))
    looped: tuple[Any, ...] = ([],)
    looped[0].append(looped)
    for value in (
        recursive,
        looped,
        list(range(3000)),
        {i: str(i) for i in range(3000)},
        {1, 2},
        frozenset([1]),
        -(2**70),
    ):
        for protocol in range(6):
            check_pickle(pickle.dumps(value, protocol=protocol), "it")


def test_malformed_pickles_say_where() -> None:
    with pytest.raises(MalformedPickleError, match="at byte 2 of 4"):
        check_pickle(b"\x80\x02\xff.", "it")


@pytest.mark.parametrize("seed", range(3))
def test_damaged_annotations_end_in_an_input_error_or_in_data(seed: int) -> None:
    rng = np.random.default_rng(seed)
    hand = {"center": np.zeros(2), "names": np.array(["a", None], object), "right": np.float32(1), "extra_info": {}}
    whole = np.frombuffer(pickle.dumps([hand], protocol=2 + seed), np.uint8)
    refused = 0
    for _ in range(1500):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 1 + int(rng.integers(3)))] = rng.integers(0, 256)
        try:
            load_annotations(damaged.tobytes(), "it")
        except InputError:
            refused += 1
    assert refused > 300
