"""Random kills of everything that a run on a cluster consists of, until each kind was killed often enough.

    python -m tests.faults.chaos FOLDER [--minutes 30] [--kills 10] [--seed 0]

FOLDER holds all of it: the experiment, `chaos.log`, `state.json` with the counts so far. Started again it goes on from
there. A round is a workdir in which runs are disturbed until one ends well; it must then hold the bytes of the run that
nobody disturbed, nothing half-written, and every shard committed once at most. Exit code 0: all rounds did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.faults.cluster import Node, RayNodes
from tests.faults.driver import Driver, read_events, run, send, workdir_of
from tests.faults.experiment import beside, leftovers, prepare, results
from tests.tiny_experiment import configure, tar_path, write_hands

KINDS = ("driver", "teacher", "decoder", "raylet", "node", "head")
TEACHER, DECODER = "ray::TeacherActor", "ray::prepared_batches"
DECODER_COMES_IN_S = 20.0
ENDING = ("driver", "head")
"""A run does not survive them."""
TARS, HANDS = 6, 64
"""Forty-eight shards of eight hands: long enough to be hit in the middle."""
NODES = 2
KILLS_A_RUN = 5
"""At most; then a run is left in peace, or none would ever end well."""
LONGEST_PEACE_S = 6.0
BEFORE_THE_FIRST_S = (0.0, 20.0, 300.0)
"""How long at most the first kill waits for a shard to be under way: some strike while a run begins."""
RUN_ENDS_IN_S = 900.0
HEAD_PATIENCE_S = "10"
"""For how long a driver asks after a head that is gone; Ray's default of 60 makes ten heads a quarter of an hour."""
WORKERS = {"count": 2, "cpus": 1, "gpus": 0}
"""In both runs: the threads of a forward pass are provenance, which is stored."""
TEACH = ("run", "teach")
MAY_END_WITH = (0, 1, -signal.SIGKILL)


@dataclass
class State:
    """What has happened so far."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    rounds: int = 0
    """Ended with the undisturbed run's bytes."""
    runs: int = 0
    exit_codes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class Chaos:
    """One chaos run in its folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "state.json"
        self.state = State(**json.loads(path.read_text())) if path.exists() else State()
        self.draw = random.Random(f"{seed} {self.state.runs}")
        self._since = time.monotonic()
        self.calm = self._undisturbed()

    def _undisturbed(self) -> Path:
        """The experiment and the run that nobody disturbs, made once."""
        config = self.folder / "calm.yaml"
        if not (self.folder / "calm.done").exists():
            for stale in (*self.folder.glob("*.yaml"), *self.folder.glob("tars/*")):
                stale.unlink()
            tars = f"tars/alpha-{{000000..{TARS - 1:06d}}}.tar"
            configure(prepare(self.folder), {"datasets.alpha.path": tars, "teacher.workers": WORKERS})
            for index in range(TARS):
                write_hands(tar_path(self.folder, "alpha", index), "alpha", index, count=HANDS)
            code, said = run(config, *TEACH)
            assert code == 0, said
            (self.folder / "calm.done").touch()
        return config

    def say(self, what: str) -> None:
        line = f"{time.strftime('%H:%M:%S', time.gmtime())} {what}\n"
        with (self.folder / "chaos.log").open("a") as log:
            log.write(line)

    def save(self) -> None:
        now = time.monotonic()
        self.state.seconds, self._since = self.state.seconds + now - self._since, now
        partial = self.folder / "state.partial"
        partial.write_text(json.dumps(asdict(self.state), indent=2))
        partial.rename(self.folder / "state.json")

    def enough(self, minutes: float, kills: int) -> bool:
        return self.state.seconds >= 60 * minutes and min(self.state.kills.values()) >= kills

    def until(self, minutes: float, kills: int) -> None:
        wanted = results(self.calm)
        with RayNodes() as ray:
            for _ in range(NODES):
                ray.add()
            while not self.enough(minutes, kills):
                config = beside(self.calm, f"chaos-{self.state.rounds}", {"cluster.address": "auto"})
                while self._disturbed(ray, config) != 0:
                    pass
                self._check(config, wanted)
                shutil.rmtree(workdir_of(config))
                self.state.rounds += 1
                self.save()
                self.say(f"round {self.state.rounds} equal; kills {self.state.kills}")

    def _check(self, config: Path, wanted: dict[str, str]) -> None:
        found = results(config)
        differ = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        assert not differ, f"{len(differ)} of {len(wanted)} differ: {differ[:10]}"
        assert leftovers(config) == []
        finished = Counter(
            event["unit"] for event in read_events(config) if event["event"] in ("shard_committed", "shard_adopted")
        )
        assert set(finished.values()) <= {1}, "a shard was finished twice"

    def _disturbed(self, ray: RayNodes, config: Path) -> int:
        """One run with some kills; its exit code."""
        os.environ.update(ray.environment, RAY_gcs_rpc_server_reconnect_timeout_s=HEAD_PATIENCE_S)
        self.state.runs += 1
        begun = len(read_events(config))
        with Driver(config, TEACH) as driver:
            at_most_s = self.draw.choice(BEFORE_THE_FIRST_S)
            self._await(driver, lambda: any(e["event"] == "teach_batch" for e in driver.events()[begun:]), at_most_s)
            for left in reversed(range(self.draw.randint(1, KILLS_A_RUN))):
                self._await(driver, lambda: False, self.draw.uniform(0, LONGEST_PEACE_S))
                if driver.process.poll() is not None:
                    break
                self._kill(ray, driver, last=left == 0)
            self._await(driver, lambda: False, RUN_ENDS_IN_S)
            code = driver.process.poll()
            assert code is not None, f"a run hangs:\n{driver.said}"
            assert code in MAY_END_WITH, f"exit code {code}:\n{driver.said}"
            if code == 1:
                self.say(f"  said: {driver.said.strip().splitlines()[-1][:300]}")
        self.state.exit_codes[str(code)] = self.state.exit_codes.get(str(code), 0) + 1
        self.save()
        return code

    @staticmethod
    def _await(driver: Driver, look: Callable[[], bool], at_most_s: float) -> None:
        """Until the driver has ended or something is seen."""
        deadline = time.monotonic() + at_most_s
        while driver.process.poll() is None and time.monotonic() < deadline and not look():
            time.sleep(0.05)

    def _kill(self, ray: RayNodes, driver: Driver, *, last: bool) -> None:
        """Kill one of what was killed least so far and is there; what ends the run only as the last one."""
        if self.state.kills["decoder"] == min(self.state.kills.values()):  # a rare sight: they live for a shard
            self._await(driver, lambda: bool(_workers(ray, DECODER)), DECODER_COMES_IN_S)
        teachers, decoders = _workers(ray, TEACHER), _workers(ray, DECODER)
        there = [kind for kind in KINDS if (kind != "teacher" or teachers) and (kind != "decoder" or decoders)]
        there = [kind for kind in there if last or kind not in ENDING]
        fewest = min(self.state.kills[kind] for kind in there)
        kind = self.draw.choice([kind for kind in there if self.state.kills[kind] <= fewest + 1])
        if kind == "driver":
            driver.kill()
        elif kind == "head":
            self._replace_head(ray, driver)
        elif kind in ("raylet", "node"):
            self._replace(ray, driver, self.draw.choice(ray.nodes), kind)
        else:
            send(self.draw.choice(teachers if kind == "teacher" else decoders), signal.SIGKILL)
        self.state.kills[kind] += 1
        self.save()
        self.say(f"  killed {kind}")

    def _replace(self, ray: RayNodes, driver: Driver, node: Node, kind: str) -> None:
        """A node is gone, at once or because its raylet died; after a while there is another one."""
        if kind == "raylet":
            node.kill("raylet")
            self._await(driver, lambda: False, LONGEST_PEACE_S)  # what is left of it is not helped to end
        node.lose()
        ray.forget(node)
        time.sleep(self.draw.uniform(0, LONGEST_PEACE_S))
        ray.add()

    def _replace_head(self, ray: RayNodes, driver: Driver) -> None:
        """The head is gone and with it the cluster; the run ends by itself, and there is a new cluster."""
        ray.head.kill("gcs_server")
        self._await(driver, lambda: False, RUN_ENDS_IN_S)
        ray.head.lose()
        for node in list(ray.nodes):
            node.lose()
            ray.forget(node)
        ray.start_head()
        for _ in range(NODES):
            ray.add()


def _workers(ray: RayNodes, title: str) -> list[int]:
    return [pid for node in ray.nodes for pid in node.workers(title)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nodes are ended before it leaves
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chaos = Chaos(arguments.folder.resolve(), arguments.seed)
    chaos.say(f"begins at {chaos.state}")
    try:
        chaos.until(arguments.minutes, arguments.kills)
    except BaseException as error:
        chaos.say(f"FAILED: {type(error).__name__}: {error}")
        raise
    finally:
        chaos.save()
    chaos.say(f"done: {chaos.state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
