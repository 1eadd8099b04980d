"""The ``jetway`` command. Heavy imports wait until the recipe is known to be good."""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jetway.configs.load import check_one_each, load_recipe, load_target, load_targets
from jetway.flows import STARTED_S
from jetway.flows.failure import Failure
from jetway.tasks.errors import ConfigError, JetwayError
from jetway.tasks.sources import find_workload

LONGEST_WAIT_S = 24 * 60 * 60
LONGEST_SOAK_MINUTES = 7 * 24 * 60


def command() -> None:
    """The process of the ``jetway`` command."""
    ending = Ending()
    try:
        ending.code = main()
    except SystemExit as exc:  # argparse's
        ending.code = int(exc.code or 0)


class Ending:
    """Ends the process once every exit handler has run: taking the modules apart takes a second or two."""

    code = 1

    def __init__(self) -> None:
        atexit.register(self.leave)  # the first to be registered is the last to run

    def leave(self) -> None:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(self.code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors of ours print their message, never a traceback."""
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(options.command(options))
    except (JetwayError, KeyboardInterrupt) as exc:
        failure = Failure.of(exc)
        failure.tell()
        if getattr(options, "json", False):
            failure.tell_as_json()
        return failure.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def run(options: argparse.Namespace) -> int:
    recipe, path = load_recipe(options.recipe, options.set)
    load_targets(options.target or recipe.targets, near=path)
    find_workload(recipe.workload, search_path=[Path.cwd(), path.parent])
    from jetway.flows.server import start_server

    server = start_server()
    with without_garbage_collection():
        from jetway.flows.run import run_deploy

    return run_deploy(
        server,
        options.recipe,
        options.target,
        options.set,
        busy_timeout_s=options.busy_timeout_s,
        as_json=options.json,
        started_s=STARTED_S,
    )


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For imports: what they make stays, and looking for garbage among it takes a sixth of their time."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def check(options: argparse.Namespace) -> int:
    recipe, path = load_recipe(options.recipe, options.set)
    targets = load_targets(options.target or recipe.targets, near=path)
    if options.deployed:
        from jetway.flows.deployed import check_deployed

        return check_deployed(recipe, path, targets, soak_minutes=options.soak)
    if options.soak is not None:
        raise ConfigError("--soak tests what is deployed: give --deployed as well.")
    from jetway.flows.check import check_recipe

    check_recipe(recipe, path, targets)
    print(f"{path}: fits {', '.join(target.name for target in targets)}")
    return 0


def probe(options: argparse.Namespace) -> int:
    target = load_target(options.target)
    from jetway.flows.check import print_target

    print_target(target, as_json=options.json)
    return 0


def doctor(options: argparse.Namespace) -> int:
    target = load_target(options.target)
    from jetway.flows.doctor import run_doctor

    return run_doctor(target, as_json=options.json, report=options.report)


def show(options: argparse.Namespace) -> int:
    from jetway.flows.show import show_run

    show_run(options.run, as_json=options.json)
    return 0


def compare(options: argparse.Namespace) -> int:
    from jetway.flows.compare import compare_runs

    return compare_runs(
        options.first,
        options.second,
        margin=options.margin,
        variants=options.variant or (),
        metrics=options.metric or (),
        minutes=options.minutes if options.in_turns else None,
        report=options.report,
        as_json=options.json,
    )


def nightly(options: argparse.Namespace) -> int:
    recipes = [(name, *load_recipe(name, options.set)) for name in options.recipes]
    check_one_each([(name, recipe) for name, recipe, _ in recipes])
    for _, recipe, path in recipes:
        load_targets(options.target or recipe.targets, near=path)
        find_workload(recipe.workload, search_path=[Path.cwd(), path.parent])
    from jetway.flows.server import start_server

    server = start_server()
    with without_garbage_collection():
        from jetway.flows.run_nightly import run_nightly
        from jetway.tasks.nightly import Policy

    return run_nightly(
        server,
        options.recipes,
        options.target,
        options.set,
        policy=Policy(options.promote),
        budget_minutes=options.budget_minutes,
        as_json=options.json,
    )


def promote(options: argparse.Namespace) -> int:
    from jetway.flows.promote import promote_run

    promote_run(options.run, options.variant, options.target or ())
    return 0


def report(options: argparse.Namespace) -> int:
    from jetway.flows.report import write_report

    print(write_report(options.run, options.output))
    return 0


def trust(options: argparse.Namespace) -> int:
    target = load_target(options.target)
    from jetway.flows.check import trust_target

    return trust_target(target, assume_yes=options.yes)


def quarantine(options: argparse.Namespace) -> int:
    from jetway.flows.quarantine import clear_target, list_quarantined

    return clear_target(options.clear) if options.clear else list_quarantined()


def ui(options: argparse.Namespace) -> int:
    from jetway.flows.ui import start_ui

    start_ui()
    return 0


def stop(options: argparse.Namespace) -> int:
    from jetway.flows.server import stop_server

    stop_server()
    return 0


def replay(options: argparse.Namespace) -> int:
    from jetway.tasks.tracking.tracker import Tracker

    print(f"handed over {Tracker().replay_left()} writes that MLflow had not taken")
    return 0


def clean(options: argparse.Namespace) -> int:
    from jetway.flows.clean import clean as clean_store

    print(clean_store(options.keep))
    return 0


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="jetway",
        description="Prune, quantize and deploy PyTorch networks to edge devices over SSH, and measure them there.",
        epilog="Exit codes: 0 passed its gates, 1 gate missed or something regressed, 2 bad config or usage, "
        "3 target, 4 stage failed, 5 measurement invalid or evidence too thin, 6 tracking, 130 interrupted.",
    )
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    command = _adder(commands)

    sub = command("run", run, "deploy a recipe and print the stage table")
    _recipe_arguments(sub)
    sub.add_argument(
        "--busy-timeout-s",
        type=_seconds,
        metavar="SECONDS",
        help="how long to wait for a target that others use, instead of its own busy_timeout_s; 0 fails at once",
    )
    _json_argument(sub)
    sub = command("check", check, "validate a recipe against its targets, without training anything")
    _recipe_arguments(sub)
    sub.add_argument(
        "--deployed",
        action="store_true",
        help="check on its targets what the recipe's newest run deployed there",
    )
    sub.add_argument(
        "--soak",
        type=_minutes,
        metavar="MINUTES",
        help="with --deployed: run the engine for so long and watch it",
    )
    sub = command("probe", probe, "print what a target is and can do")
    sub.add_argument("target", help="name of a target, or its YAML file")
    _json_argument(sub)
    sub = command("doctor", doctor, "try a target out with tiny networks in every precision it has")
    sub.add_argument("target", help="name of a target, or its YAML file")
    sub.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="where the report goes; jetway-doctor-TARGET.md by default",
    )
    _json_argument(sub)
    sub = command("show", show, "print the stage table of a finished run")
    sub.add_argument("run", help="MLflow run id or the start of one, or 'latest'")
    _json_argument(sub)
    sub = command(
        "compare", compare, "compare two finished runs: what changed, and whether something got worse"
    )
    _compare_arguments(sub)
    _json_argument(sub)
    sub = command(
        "nightly", nightly, "say of each recipe on each target whether it got worse than its champion"
    )
    _nightly_arguments(sub)
    _json_argument(sub)
    sub = command(
        "promote", promote, "make what a finished run deployed the champion that nights are held against"
    )
    sub.add_argument("run", help="MLflow run id or the start of one, or 'latest'")
    sub.add_argument("--variant", metavar="NAME", help="this one; by default the fastest that missed no gate")
    sub.add_argument("--target", action="append", metavar="NAME", help="on this one alone; may be repeated")
    sub = command("report", report, "write the HTML report of a finished run")
    sub.add_argument("run", help="MLflow run id or the start of one, or 'latest'")
    sub.add_argument(
        "--output", type=Path, metavar="FILE", help="where it goes; jetway-report-RUN.html by default"
    )
    sub = command("trust", trust, "show a target's host key and record it")
    sub.add_argument("target", help="name of a target, or its YAML file")
    sub.add_argument(
        "--yes", action="store_true", help="record without asking; compare the fingerprint elsewhere"
    )
    sub = command("quarantine", quarantine, "list the targets that keep giving INVALID measurements")
    sub.add_argument("--clear", metavar="TARGET", help="let runs on several targets use this one again")
    command("ui", ui, "open the MLflow and Prefect pages of this machine, until Ctrl-C")
    command("stop", stop, "stop the local Prefect server")
    command("replay", replay, "hand over what runs spooled while MLflow was away")
    sub = command("clean", clean, "free the store, keeping what the newest runs need")
    sub.add_argument(
        "--keep", type=_positive_number, required=True, metavar="N", help="newest runs to keep whole"
    )
    return root


def _adder(commands: Any) -> Any:
    def add(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=text.capitalize() + "."
        )
        sub.set_defaults(command=function)
        return sub

    return add


def _compare_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("first", help="MLflow run id or the start of one: what the other is compared with")
    sub.add_argument("second", help="the run that is judged; 'latest' is the newest")
    sub.add_argument(
        "--margin",
        type=_share,
        default=0.01,
        metavar="SHARE",
        help="smallest drop of a score that must not pass unseen; 0.01 by default",
    )
    sub.add_argument(
        "--metric", action="append", metavar="NAME", help="judge this metric alone; may be repeated"
    )
    sub.add_argument(
        "--variant",
        action="append",
        metavar="NAME",
        help="compare this one alone, or a pattern; may be repeated",
    )
    sub.add_argument(
        "--in-turns",
        action="store_true",
        help="measure both runs' engines on their targets, in turns, for a verdict on latency",
    )
    sub.add_argument(
        "--minutes",
        type=_minutes,
        default=10.0,
        metavar="MINUTES",
        help="with --in-turns: longest measurement of a variant; 10 by default",
    )
    sub.add_argument("--report", type=Path, metavar="FILE", help="write an HTML page of it too")


def _nightly_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("recipes", nargs="+", metavar="recipe", help="name of a recipe, or its YAML file")
    _target_arguments(sub)
    sub.add_argument(
        "--promote",
        choices=("never", "on-improvement", "by-hand"),
        default="on-improvement",
        help="when a candidate becomes champion; on-improvement takes the first sound one too",
    )
    sub.add_argument(
        "--budget-minutes",
        type=_minutes,
        default=10.0,
        metavar="MINUTES",
        help="longest that two engines are measured in turns; 10 by default",
    )


def _recipe_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("recipe", help="name of a recipe, or its YAML file")
    _target_arguments(sub)


def _target_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--target",
        action="append",
        metavar="NAME",
        help="instead of the recipe's: a name or file, labels (class=orin,site=lab), or all; may be repeated",
    )
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key: --set qat.epochs=3"
    )


def _json_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")


def _positive_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number, such as 10")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= LONGEST_WAIT_S:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds up to a day, such as 0 or 600")
    return seconds


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share above 0 and below 1, such as 0.01")
    return share


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes <= LONGEST_SOAK_MINUTES:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes up to a week, such as 10 or 0.5")
    return minutes


if __name__ == "__main__":
    command()
