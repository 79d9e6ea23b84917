"""A workdir on an object store, and its copy on this machine: the store is the truth, the copy is what programs open.

Same names on both sides. What is copied is everything but shards, which are written straight to the store and read
through the disk cache (storage/remote.py), and locks. What another version of a file replaces is told by its ETag.

Order makes a commit atomic: a folder's files are put before the file that says that they are whole (`_rank`), a shard's
objects before its ledger record. Killed in between, the store holds objects that nothing names: `orphans`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from storage.bucket import Bucket, Found
from storage.durable import (
    file_stamp,
    is_partial,
    parse_sealed_json,
    remove_tree,
    sealed_json,
    write_bytes_atomic,
)
from storage.errors import DamageError, WorkError
from storage.ledger import ShardRecord, record_document, record_of_document

OWN = ".store"
"""The copy's own folder: what it knows of the store."""
LEASE = "lease.json"
"""Of the store: who may write (pipeline/store_lease.py). Never copied: the copy's own file of this name is a lock."""
ATTEMPTS_AT_A_SHARD = 5
"""So often a shard is written when another worker's objects of the same shard come in between."""

_CACHE = "cache/"
_SHARD = re.compile(r"cache/[0-9a-f]{16}/shards/")
_NEVER = re.compile(r"(^|/)(lease\.json|[^/]*\.lock|mlflow\.db.*)$|^\.store/")
_STUDENT = re.compile(r"(students/[^/]+/[^/]+/[^/]+)/(.+)")
_OF_THE_RUN = ("logs/", "references/", "state/", "tracking/")
_RESULT = "result.json"
_WITH_RESULT_ONLY = "student/"
"""A student's network: its folder got its name when it was whole, and objects have no folders."""
_BY_NAME = {
    "mlflow_run.json": -1,  # how far tracking.jsonl is delivered: never further than what is there of it
    "checkpoint.pt": 1,  # after the best network so far, which it names
    "evaluation.json": 1,  # after the samples
    "calibration.json": 1,
    "cache.json": 1,  # after the attachments
    _RESULT: 2,
    "logged.json": 2,
    "identity.json": 2,  # of the report: what it was made from
    "HEAD.json": 3,  # after the snapshots
}


@dataclass(frozen=True)
class Mirror:
    """One workdir's copy. Cheap, and picklable: on another machine it is that machine's copy, at the same path."""

    root: Path
    url: str

    @cached_property
    def bucket(self) -> Bucket:
        """The store's side."""
        return Bucket(self.url)

    def __reduce__(self) -> tuple[type[Mirror], tuple[Path, str]]:
        return Mirror, (self.root, self.url)

    def name_of(self, path: Path) -> str:
        """What a file or folder of the copy is called on the store."""
        return path.relative_to(self.root).as_posix()

    def address(self, path: Path) -> str:
        """The URL of a file or folder of the copy."""
        return f"{self.url}/{self.name_of(path)}"

    def pull(self, is_ours: Callable[[], bool]) -> None:
        """Make the copy what the store is.

        is_ours: asked while no other process changes the copy. True: nobody else has written to the store since this
        copy did, so what is here and not there is newer, and stays (all but ledger records: those the store alone
        decides). Else it goes.
        """
        with self._locked():
            ours = is_ours()
            listing, shards = self._listing()
            known = self._index()
            wanted = {name: found for name, found in listing.items() if _is_whole(name, listing)}
            fetch = [
                name
                for name, found in wanted.items()
                if (known.get(name) or [""])[0] != found.etag
                or (file_stamp(self.root / name) != known[name][1:] and not (ours and (self.root / name).is_file()))
            ]
            for name, etag in zip(fetch, self.bucket.at_once(self._fetch, fetch), strict=True):
                known[name] = [etag, *file_stamp(self.root / name)]
            for path in list(self._files()):
                name = self.name_of(path)
                if name not in wanted and (not ours or _ledger(name)):
                    path.unlink(missing_ok=True)
            self._save({name: entry for name, entry in known.items() if name in wanted}, shards)

    def push(self, *, leads: bool = True) -> None:
        """Put what is new or changed here onto the store, what says that a folder is whole after the folder's files.

        leads: this is the run itself; a worker, which may be on another machine, puts its results only, no log.
        """
        with self._locked():
            known = self._index()
            stamps = {self.name_of(path): file_stamp(path) for path in self._files()}
            if not leads:
                stamps = {name: stamp for name, stamp in stamps.items() if not name.startswith(_OF_THE_RUN)}
            new = sorted(
                (name for name, stamp in stamps.items() if stamp and (known.get(name) or [""])[1:] != stamp), key=_rank
            )
            for _, names in groupby(new, _rank):
                there = list(names)
                for name, etag in zip(
                    there, self.bucket.at_once(lambda name: self._put(name, stamps[name]), there), strict=True
                ):
                    if etag is not None:
                        known[name] = [etag, *stamps[name]]
                self._save(known, None)
            gone = [name for name in known if not (self.root / name).is_file()]
            over = [name for name in gone if _superseded(name, new, leads=leads)]
            self.bucket.delete(over)
            self._save({name: entry for name, entry in known.items() if name not in over}, None)

    def remove(self, path: Path) -> None:
        """Delete a file or a folder, here and on the store; of a shard its ledger record first."""
        name = self.name_of(path)
        with self._locked():
            if _SHARD.match(name) and path.suffix == ".zarr":
                record = path.parent.parent / "ledger" / f"{path.stem}.json"
                self.bucket.delete([self.name_of(record)])
                record.unlink(missing_ok=True)
            below = [each for each in self.bucket.below(name) if each == name or each.startswith(f"{name}/")]
            self.bucket.delete(sorted(below, key=_rank, reverse=True))  # what says that it is whole goes first
            if path.exists():
                remove_tree(path)
            known = self._index()
            self._save({each: entry for each, entry in known.items() if each not in below}, None)

    def shards(self, fingerprint: str) -> frozenset[str]:
        """Input hashes of the shards of which anything lies on the store, as of the last `pull`."""
        return frozenset(self._notes().get("shards", {}).get(fingerprint, ()))

    def bytes_below(self, path: Path) -> int:
        """What a file or folder takes on the store."""
        name = self.name_of(path)
        below = self.bucket.below(name)
        return sum(found.bytes for each, found in below.items() if each == name or each.startswith(f"{name}/"))

    def orphans(self) -> list[str]:
        """Names of what killed writers left on the store: shards without a record, networks without a result.

        Only while nobody writes. Shards as folders, which end in .zarr.
        """
        listing, shards = self._listing()
        loose = [name for name in listing if not _is_whole(name, listing)]
        unnamed = [
            f"{_CACHE}{fingerprint}/shards/{shard}.zarr"
            for fingerprint, found in shards.items()
            for shard in found
            if f"{_CACHE}{fingerprint}/ledger/{shard}.json" not in listing
        ]
        return sorted([*loose, *unnamed])

    def record(self, cache: Path, input_hash: str) -> ShardRecord | None:
        """The store's record of a shard; None where it has none that is sound."""
        try:
            data, _ = self.bucket.read(self.name_of(cache / "ledger" / f"{input_hash}.json"))
            return record_of_document(parse_sealed_json(data, input_hash))
        except (FileNotFoundError, DamageError):
            return None

    def commit_shard(self, cache: Path, folder: Path, record: ShardRecord) -> ShardRecord:
        """Put a written shard onto the store and record it; what is recorded in the end, which another may have made.

        folder: where its files are, on this machine. Whoever else writes the same shard at the same time, the record
        that stands names the bytes that stand: objects are looked at between the last of them and the record, and
        again where another's record was there first.
        """
        shard = self.name_of(cache / "shards" / f"{record.input_hash}.zarr")
        name = self.name_of(cache / "ledger" / f"{record.input_hash}.json")
        data = sealed_json(record_document(record))
        for _ in range(ATTEMPTS_AT_A_SHARD):
            files = sorted(record.files, key=lambda file: file == "zarr.json")  # the group's own document last
            etags = self.bucket.at_once(lambda file: self._put_shard_file(f"{shard}/{file}", folder / file), files)
            wanted = {f"{shard}/{file}": etag for file, etag in zip(files, etags, strict=True)}
            if self._stand(shard, wanted) and self._recorded(name, data, shard, wanted):
                return self._noted(cache, record.input_hash)
            theirs = self.record(cache, record.input_hash)
            if theirs is not None and theirs != record and self._holds(shard, theirs):
                return self._noted(cache, record.input_hash)
        raise WorkError(f"{self.url}/{shard}: other workers keep writing to it; stop them, then run again")

    def fetch_shard(self, cache: Path, record: ShardRecord) -> Path:
        """All files that the store has of a shard, in the copy; for who looks at every byte (`verify`)."""
        shard = cache / "shards" / f"{record.input_hash}.zarr"
        if shard.exists():
            remove_tree(shard)
        self.bucket.at_once(self._fetch, self.bucket.below(f"{self.name_of(shard)}/"))
        return shard

    def _put_shard_file(self, name: str, path: Path) -> str:
        with path.open("rb") as file:
            return self.bucket.write(name, file)

    def _recorded(self, name: str, data: bytes, shard: str, wanted: dict[str, str]) -> bool:
        """Whether our record stands, and the objects are still ours."""
        if self.bucket.write_if(name, data, None) is not None:
            return True
        found, etag = self.bucket.read(name)
        if found == data:
            return True  # ours, whose answer was lost, or one of the same bytes
        if not self._stand(shard, wanted):
            return False  # theirs stands
        return self.bucket.write_if(name, data, etag) is not None

    def _stand(self, shard: str, wanted: dict[str, str]) -> bool:
        found = self.bucket.below(f"{shard}/")
        return {name: each.etag for name, each in found.items()} == wanted

    def _holds(self, shard: str, record: ShardRecord) -> bool:
        found = self.bucket.below(f"{shard}/")
        return {name: each.bytes for name, each in found.items()} == {
            f"{shard}/{file}": digest.bytes for file, digest in record.files.items()
        }

    def _noted(self, cache: Path, input_hash: str) -> ShardRecord:
        """The store's record, copied: from here on this machine knows that the shard is finished."""
        path = cache / "ledger" / f"{input_hash}.json"
        data, _ = self.bucket.read(self.name_of(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(path, data)
        return record_of_document(parse_sealed_json(data, str(path)))

    def _fetch(self, name: str) -> str:
        if not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise DamageError(f"{self.url} holds an object {name!r}, whose name leads out of a workdir; delete it")
        return self.bucket.fetch(name, self.root / name)

    def _put(self, name: str, stamp: list[Any]) -> str | None:
        """Put one file; None: it is gone since it was listed, or says more now than what was put before it."""
        try:
            with (self.root / name).open("rb") as file:
                if _rank(name) > 0 and file_stamp(file.fileno()) != stamp:
                    return None
                return self.bucket.write(name, file)
        except FileNotFoundError:
            return None

    def _listing(self) -> tuple[dict[str, Found], dict[str, list[str]]]:
        """(every object that is copied, by name; the shards of each cache). Shards are counted, not looked into."""
        found, folders = self.bucket.inside("")
        shards: dict[str, list[str]] = {}
        for below in self.bucket.at_once(self.bucket.below, [name for name in folders if name != _CACHE]):
            found |= below
        caches = self.bucket.inside(_CACHE)[1] if _CACHE in folders else []
        for cache in caches:
            for folder in ("shards", "ledger", "snapshots"):  # a cache has them, full or empty
                (self.root / cache / folder).mkdir(parents=True, exist_ok=True)
            files, inside = self.bucket.inside(cache)
            found |= files
            for folder in inside:
                if _SHARD.fullmatch(folder):
                    paths = self.bucket.inside(folder)[1]
                    shards[PurePosixPath(cache).name] = [PurePosixPath(path).stem for path in paths]
                else:
                    found |= self.bucket.below(folder)
        return {name: each for name, each in found.items() if not _NEVER.search(name)}, shards

    def _files(self) -> Iterator[Path]:
        """The files here that the store has, or should have."""
        for folder, folders, files in os.walk(self.root):
            here = Path(folder)
            folders[:] = [name for name in folders if name != OWN and not is_partial(here / name)]
            for path in (here / name for name in sorted(files)):
                name = self.name_of(path)
                if not is_partial(path) and not _NEVER.search(name) and not _SHARD.match(name):
                    yield path

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time brings this copy and the store together."""
        (self.root / OWN).mkdir(parents=True, exist_ok=True)
        with (self.root / OWN / "sync.lock").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _notes(self) -> dict[str, dict[str, list[Any]]]:
        try:
            notes: dict[str, dict[str, list[Any]]] = json.loads((self.root / OWN / "index.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return {}  # only a memory: without it everything is copied again
        return notes

    def _index(self) -> dict[str, list[Any]]:
        """Name -> (ETag, size, time and inode of the file here when both were the same)."""
        return self._notes().get("files", {})

    def _save(self, files: dict[str, list[Any]], shards: dict[str, list[str]] | None) -> None:
        kept = self._notes().get("shards", {}) if shards is None else shards
        data = json.dumps({"files": files, "shards": kept}, sort_keys=True).encode()
        write_bytes_atomic(self.root / OWN / "index.json", data)


def _rank(name: str) -> int:
    """When a file is put: what says that others are whole comes after them."""
    if name.startswith(_CACHE) and name.endswith(".json") and "/snapshots/" in name:
        return 1
    if name.startswith(("references/", "state/")):
        return 4
    if name.endswith("/identity.json") and not name.startswith("report/"):
        return 0
    return _BY_NAME.get(PurePosixPath(name).name, 0)


def _is_whole(name: str, listing: Iterable[str]) -> bool:
    """Whether an object may be used: a student's network only with its result, its checkpoint only without."""
    student = _STUDENT.fullmatch(name)
    if student is None:
        return True
    finished = f"{student[1]}/{_RESULT}" in listing
    return finished or not student[2].startswith(_WITH_RESULT_ONLY)


def _superseded(name: str, new: Iterable[str], *, leads: bool) -> bool:
    """Whether an object is of no use any more, which this copy has given up: what a finished student was resumed from,
    and spools that MLflow has in full."""
    student = _STUDENT.fullmatch(name)
    return (leads and name.startswith("tracking/")) or (student is not None and f"{student[1]}/{_RESULT}" in new)


def _ledger(name: str) -> bool:
    return name.startswith(_CACHE) and "/ledger/" in name
