"""The command line: verbs here, settings in the file. Exit codes: 0 done, 1 work failed, 2 the input is wrong."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pipeline.logs import forwarding, set_up_logging, write_line
from pipeline.stopping import NOTICE
from pipeline.waiting import wait_asleep
from storage.errors import DamageError, InputError, WorkError

STAGE_NAMES = ("synthesise", "ingest", "teach", "train", "evaluate", "compare")
Command = Callable[[argparse.Namespace], int]
_GO_ON = "what is finished is kept, the same command goes on from there"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    wait_asleep()
    try:
        arguments, unknown = build_parser().parse_known_args(given)
        if unknown:
            arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")  # with the verb's own usage
    except UsageError as error:
        return _misused(error, in_json="--json" in given)
    set_up_logging(verbose=arguments.verbose, log_format=arguments.log_format)
    stopped_by: list[signal.Signals] = []

    def on_sigterm(number: int, _frame: FrameType | None) -> None:
        """Leave as after Ctrl-C, so that what was begun is ended and Ray's processes stop with us."""
        stopped_by.append(signal.Signals(number))  # Ray may raise a KeyboardInterrupt of its own in place of ours
        if not NOTICE.give():
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        return int(arguments.command(arguments))
    except (InputError, WorkError, DamageError) as error:
        if arguments.verbose:
            logging.getLogger("handstill").exception("the command failed")
        return _failed(arguments, str(error), 2 if isinstance(error, InputError) else 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; say nothing more
        return 1
    except OSError as error:  # a full disk, a folder that may not be written to
        if arguments.verbose:
            logging.getLogger("handstill").exception("the command failed")
        return _failed(arguments, f"{error}; {arguments.afterwards}", 1)
    except KeyboardInterrupt:
        cause = stopped_by[0] if stopped_by else signal.SIGINT
        return _failed(arguments, f"stopped by {cause.name}; {arguments.afterwards}", 128 + cause)
    finally:
        NOTICE.forget()


class UsageError(Exception):
    """The command line is wrong: the usage, and what is wrong with it."""


class _Parser(argparse.ArgumentParser):
    """Leaves it to `main` to say what is wrong, to scripts too."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(self.format_usage(), f"{self.prog}: error: {message}")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        _say(f"handstill {version('handstill')}")
        parser.exit()


def _misused(error: UsageError, *, in_json: bool) -> int:
    usage, message = error.args
    _say(f"{usage}{message}", sys.stderr)
    if in_json:
        _say(json.dumps({"ok": False, "error": message, "exit_code": 2}))
    return 2


def _failed(arguments: argparse.Namespace, message: str, code: int) -> int:
    """Say why on stderr, to a script on stdout too."""
    write_line(f"handstill: {message}", level="ERROR", exit_code=code)
    if arguments.json:
        _say(json.dumps({**arguments.about, "ok": False, "error": message, "exit_code": code}))
    return code


def _global_options() -> _Parser:
    """The options that every verb takes; a new one each time, because argparse shares defaults between users."""
    shared = _Parser(add_help=False)
    shared.add_argument("-c", "--config", type=Path, default=argparse.SUPPRESS, metavar="FILE")
    shared.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON document on stdout")
    shared.add_argument(
        "--log-format", choices=("text", "json"), default=argparse.SUPPRESS, help="of the log on stderr (text)"
    )
    shared.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="details, tracebacks")
    return shared


def build_parser() -> argparse.ArgumentParser:
    """Every verb with its arguments; global options may stand before or after the verb."""
    parser = _Parser(
        prog="handstill",
        description="Offline distillation of HaMeR into small 3D hand mesh networks.",
        parents=[_global_options()],
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.set_defaults(config=Path("pipeline.yaml"), json=False, verbose=False, log_format="text")
    parser.set_defaults(afterwards=_GO_ON, about={})  # of the command, for `main`
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, command: Command, help_text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=help_text, description=help_text, parents=[_global_options()])
        added.set_defaults(command=command, parser=added)
        return added

    check = verb("check", _check, "validate the configuration and print it resolved")
    check.add_argument("--schema", action="store_true", help="print the file's JSON schema instead")
    plan = verb("plan", _plan, "what would run and why; writes nothing")
    plan.add_argument("stage", nargs="?", choices=STAGE_NAMES, metavar="STAGE")
    plan.add_argument(
        "--rehash", action="store_true", help="read every source and shard again instead of trusting sizes and times"
    )
    run = verb("run", _run, "run a stage (default: all) and whatever upstream is missing")
    run.add_argument("stage", nargs="?", choices=STAGE_NAMES, metavar="STAGE")
    run.add_argument(
        "--rehash", action="store_true", help="read every source and shard again instead of trusting sizes and times"
    )
    for parser_with_limit in (plan, run):
        parser_with_limit.add_argument(
            "--limit", type=int, metavar="N", help="a smoke run of its own on the first N samples of each set"
        )
    verb("status", _status, "per stage: done, quarantined, stale, last error")
    show = verb("show", _show, "an output: arrays, dimensions, dtypes, units, provenance; or one cached sample")
    show.add_argument("what", metavar="STAGE|PATH|SAMPLE_ID")
    show.add_argument("--view", type=int, metavar="N", help="of a sample: only this view")
    show.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="of a sample: a PNG of its views, stored and made again, with joints",
    )
    verify = verb("verify", _verify, "re-read every shard; re-run the teacher and remake the views of some rows")
    verify.add_argument("--no-teacher", action="store_true", help="do not run the teacher again")
    verify.add_argument("--no-sources", action="store_true", help="do not read the sources, nor make views from them")
    audit = verb("audit", _audit, "statistics over whole caches: odd features, impossible outputs, labels to look at")
    audit.add_argument("--against", metavar="FOLDER|FINGERPRINT", help="another cache, to see what drifted")
    audit.add_argument(
        "--on", choices=("local", "ray"), help="Dask in this process, or on Ray (default: as the cluster)"
    )
    export = verb("export", _export, "a student as ONNX, checked against PyTorch, with a numpy runtime and a card")
    export.add_argument(
        "what", metavar="NAME|FOLDER", help="a student of the file, the folder of one, or models:/NAME@ALIAS"
    )
    export.add_argument("--seed", type=int, metavar="N", help="of a student: this seed (default: the best scored)")
    export.add_argument("--to", type=Path, metavar="FOLDER", help="a new folder (default: in the workdir)")
    export.add_argument("--with-hand-model", action="store_true", help="joints and mesh in the graph; mind its licence")
    export.add_argument("--int8", action="store_true", help="quantise the backbone, calibrated on cached pictures")
    compare = verb("compare", _compare, "the students side by side, from MLflow; exit 1 when the gate is not passed")
    compare.add_argument(
        "--experiment",
        action="append",
        default=[],
        metavar="NAME",
        help="other runs than the file's own: this MLflow experiment; again for more",
    )
    compare.add_argument("--filter", default="", metavar="TEXT", help="only students' runs that fit, in MLflow's words")
    compare.add_argument("--tracking-uri", metavar="URI", help="of the MLflow to read (default: the file's)")
    compare.add_argument("--out", type=Path, metavar="FOLDER", help="where such a report goes (comparison)")
    submit = verb("submit", _submit, "the same run as a Ray job on a cluster; follow its log; stop it")
    submit.add_argument("stage", nargs="?", choices=STAGE_NAMES, metavar="STAGE")
    submit.add_argument("--limit", type=int, metavar="N", help="a smoke run, as of `run`")
    submit.add_argument("--no-wait", action="store_true", help="say the job's id and leave it to itself")
    one_job = submit.add_mutually_exclusive_group()
    one_job.add_argument("--follow", metavar="JOB", help="submit nothing; follow this job")
    one_job.add_argument("--stop", metavar="JOB", help="submit nothing; stop this job")
    predict = verb("predict", _predict, "the hands in pictures, folders and videos: joints, meshes, overlays")
    _add_predict_options(predict)
    predict.set_defaults(afterwards="what is finished is kept whole, the same command makes all of it again")
    clean = verb("clean", _clean, "list outputs that no plan refers to")
    clean.add_argument("--stale", action="store_true", required=True)
    how = clean.add_mutually_exclusive_group()
    how.add_argument("--yes", action="store_true", help="delete them")
    how.add_argument("--dry-run", action="store_true", help="only say what, and how many bytes (default)")
    return parser


def _add_predict_options(predict: argparse.ArgumentParser) -> None:
    predict.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a picture, a video, or a folder of them")
    predict.add_argument(
        "--network",
        default="teacher",
        metavar="NAME|PATH",
        help="a student by name, folder or models:/NAME@ALIAS; a checkpoint; or the file's `teacher` (default)",
    )
    predict.add_argument("--mano-model", metavar="FILE", help="hand model for a checkpoint without one, or open-hand")
    predict.add_argument(
        "--box",
        action="append",
        default=[],
        metavar="X,Y,W,H[,SIDE]",
        help="a tight box round a hand in px, and left or right; once for each hand of the one picture",
    )
    predict.add_argument("--boxes", type=Path, metavar="FILE", help="JSON: boxes of many pictures")
    predict.add_argument("--detector", type=Path, metavar="WHEEL", help="MediaPipe's wheel, to find hands with")
    predict.add_argument("--out", type=Path, default=Path("predictions"), metavar="FOLDER", help="(predictions)")
    predict.add_argument("--rescale", type=float, default=2.0, help="boxes times this are seen (2: boxes are tight)")
    predict.add_argument("--focal-px", type=float, help="focal length of the camera (HaMeR's assumption)")
    predict.add_argument("--mesh", choices=("obj", "ply", "glb"), default="obj", help="format of the meshes (obj)")


def _check(arguments: argparse.Namespace) -> int:
    import yaml

    from pipeline.checking import check_inputs
    from pipeline.experiment import open_experiment
    from pipeline.loading import json_schema

    if arguments.schema:
        _say(json.dumps(json_schema(), indent=2))
        return 0
    experiment = open_experiment(arguments.config)
    check_inputs(experiment)
    document = experiment.config.model_dump(mode="json")
    _say(
        json.dumps(document)
        if arguments.json
        else yaml.safe_dump(document, sort_keys=False, allow_unicode=True).rstrip()
    )
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from pipeline.experiment import open_experiment
    from pipeline.run import plan_all
    from pipeline.tables import plan_text

    experiment = open_experiment(arguments.config, limit=arguments.limit, rehash=arguments.rehash)
    plans = plan_all(experiment, arguments.stage)
    _answer(arguments, {"stages": {name: plan.as_json() for name, plan in plans.items()}}, lambda: plan_text(plans))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from pipeline.experiment import open_experiment
    from pipeline.run import run_all
    from pipeline.summary import RunSummary
    from pipeline.tables import run_text

    experiment = open_experiment(arguments.config, limit=arguments.limit, rehash=arguments.rehash)
    summary = RunSummary(experiment)
    try:
        with forwarding(experiment.workdir.events):
            results = run_all(experiment, arguments.stage, summary)
    finally:
        arguments.about = summary.document
    _answer(arguments, {"ok": True, **summary.document}, lambda: run_text(experiment, results))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from pipeline.experiment import open_experiment
    from pipeline.status import status
    from pipeline.tables import status_text

    document = status(open_experiment(arguments.config))
    _answer(arguments, document, lambda: status_text(document))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from pipeline.showing import is_sample_id, show, show_text

    if is_sample_id(arguments.what):
        return _show_sample(arguments)
    if arguments.view is not None or arguments.picture is not None:
        raise InputError(f"show {arguments.what}: --view and --picture are for samples (<data set>:<key>#<hand>)")
    document = show(arguments.config, arguments.what)
    _answer(arguments, document, lambda: show_text(document))
    return 0


def _show_sample(arguments: argparse.Namespace) -> int:
    from pipeline.experiment import open_experiment
    from pipeline.showing_sample import sample_text, show_sample

    experiment = open_experiment(arguments.config)
    document = show_sample(experiment, arguments.what, view=arguments.view, picture=arguments.picture)
    _answer(arguments, document, lambda: sample_text(document))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from pipeline.experiment import open_experiment
    from pipeline.verify import verify, verify_text

    experiment = open_experiment(arguments.config)
    document = verify(experiment, with_teacher=not arguments.no_teacher, with_sources=not arguments.no_sources)
    _answer(arguments, document, lambda: verify_text(document))
    return 0 if document["ok"] else 1


def _audit(arguments: argparse.Namespace) -> int:
    from pipeline.auditing import audit, audit_text
    from pipeline.experiment import open_experiment

    document = audit(open_experiment(arguments.config), against=arguments.against, on=arguments.on)
    _answer(arguments, document, lambda: audit_text(document))
    return 0 if document["ok"] else 1


def _export(arguments: argparse.Namespace) -> int:
    from pipeline.exporting import Wish, export, export_text

    wish = Wish(arguments.what, arguments.seed, arguments.to, arguments.with_hand_model, arguments.int8)
    document = export(arguments.config, wish)
    _answer(arguments, document, lambda: export_text(document))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from pipeline.comparing import CompareRequest, compare_elsewhere, compare_now
    from pipeline.experiment import open_experiment

    named = tuple(arguments.experiment)
    request = CompareRequest(named, arguments.filter, arguments.tracking_uri, arguments.out)
    if request.out is not None:
        _check_out(request.out)
    if request.out is not None and not request.elsewhere:
        raise InputError(
            "--out is for other runs than the file's own; name them: --experiment, --filter, --tracking-uri"
        )
    comparison, text = (
        compare_elsewhere(arguments.config, request)
        if request.elsewhere
        else compare_now(open_experiment(arguments.config))
    )
    _answer(arguments, comparison, lambda: text)
    return 0 if comparison["gate"]["passed"] else 1


def _submit(arguments: argparse.Namespace) -> int:
    from pipeline.loading import load_config
    from pipeline.submitting import follow, stop, submit

    for option, job in (("--follow", arguments.follow), ("--stop", arguments.stop)):
        if job and (arguments.stage or arguments.limit is not None or arguments.no_wait):
            raise InputError(
                f"{option} is for a job that was submitted already: leave out STAGE, --limit and --no-wait"
            )
    config = load_config(arguments.config)
    if arguments.stop:
        stopped = stop(config, arguments.stop)
        said = f"{arguments.stop}: {'stopping' if stopped else 'had ended already'}"
        _answer(arguments, {"ok": True, "job": arguments.stop, "stopping": stopped}, lambda: said)
        return 0
    if arguments.limit is not None and arguments.limit < 1:
        raise InputError(f"--limit: found {arguments.limit}, want a number of samples of at least 1")
    limit = [] if arguments.limit is None else ["--limit", str(arguments.limit)]
    stage = [arguments.stage] if arguments.stage else []
    log_format = ["--log-format", arguments.log_format]
    job = arguments.follow or submit(config, arguments.config, ["run", *stage, *limit, *log_format])
    if arguments.no_wait:
        _answer(arguments, {"ok": True, "job": job}, lambda: job)
        return 0
    arguments.afterwards = f"the job goes on. Follow it: submit --follow {job}; end it: submit --stop {job}"
    document = follow(config, job)
    ending = f"{job}: {document['status'].lower()}, exit code {document['exit_code']}"
    _answer(arguments, document, lambda: ending)
    return int(document["exit_code"])


def _predict(arguments: argparse.Namespace) -> int:
    from models.hand_box import parse_hand_box
    from pipeline.predicting import PredictRequest, predict, predict_text

    request = PredictRequest(
        paths=arguments.paths,
        out=_check_out(arguments.out),
        network=arguments.network,
        config=arguments.config,
        mano_model=arguments.mano_model,
        boxes=[parse_hand_box(text) for text in arguments.box],
        boxes_file=arguments.boxes,
        detector=arguments.detector,
        rescale=arguments.rescale,
        focal_px=arguments.focal_px,
        mesh=arguments.mesh,
    )
    document = predict(request)
    _answer(arguments, document, lambda: predict_text(document))
    return 0 if document["ok"] else 1


def _clean(arguments: argparse.Namespace) -> int:
    from pipeline.clean import clean, clean_text
    from pipeline.experiment import open_experiment

    document = clean(open_experiment(arguments.config), delete=arguments.yes)
    _answer(arguments, document, lambda: clean_text(document))
    return 0


def _answer(arguments: argparse.Namespace, document: Any, text: Callable[[], str]) -> None:
    _say(json.dumps(document) if arguments.json else text())


def _check_out(out: Path) -> Path:
    """The same folder. InputError where it cannot be written into or made, before anything is computed for it."""
    there = next(place for place in (out.absolute(), *out.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "may not be written to" if there.is_dir() else "is a file"
        raise InputError(f"--out: {there} {why}; give a folder, or the name of one to make")
    return out


def _say(text: str, stream: Any = None) -> None:
    print(text, file=stream or sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main())
