"""`longalign STAGE RECIPE.yaml [section.key=value ...]`: a subcommand a stage. Exit 0 done, 1 failed, 2 bad config."""

from __future__ import annotations

import argparse
import errno
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from longalign_ray.errors import ConfigError, LongAlignError
from longalign_ray.logs import configure_logging

logger = logging.getLogger(__name__)

RUN_DIR_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

HELP = {
    "run": "all stages in order, skipping those that are done",
    "construct": "make long instruction data from documents",
    "prepare": "tokenise the corpus, plan packs, write packed blocks",
    "plan": "steps, balance, memory and time of a plan, before anything is trained; from a recipe or from lengths",
    "inspect": "show a prepared example with its targets coloured, or a pack with its boundaries",
    "train": "train; an interrupted run continues where it stopped",
    "export": "write the newest checkpoint as a Hugging Face directory",
    "serve": "serve the base and the aligned model behind an OpenAI-compatible endpoint",
    "generate": "answer a file of requests (generate.requests=FILE.jsonl) without a server, on all replicas",
    "evaluate": "needle test, held-out loss and benchmarks, before and after",
    "report": "write report.html",
    "compare": "scores of several runs side by side, with intervals",
    "score": "score predictions on disk, in a benchmark's published format",
    "doctor": "check this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command `longalign`; returns the exit code."""
    arguments = _parse(argv)
    configure_logging()
    try:
        return _run(arguments)
    except LongAlignError as error:
        # Ray adds the traceback of its worker to the message; the error itself is then the cause.
        logger.error("%s", cause if isinstance(cause := getattr(error, "cause", None), LongAlignError) else error)
        return error.exit_code
    except OSError as error:  # disk full, permission denied: the path and the reason are all that a user needs
        remedy = "; free some space or choose another run_dir" if error.errno in RUN_DIR_ERRNOS else ""
        logger.error("%s: %s%s", error.filename or type(error).__name__, error.strerror or error, remedy)
        logger.debug("traceback", exc_info=True)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; the same command continues where it stopped")
        return 130
    except Exception as error:  # a traceback is never the last word
        logger.exception("traceback:")
        logger.error("`%s` failed with %s: %s", arguments.command, type(error).__name__, error)
        return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Settings may stand behind options too, where argparse alone would not take them."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or "overrides" not in arguments]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="longalign", description="Align a language model on long context.")
    subcommands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in HELP.items():
        command = subcommands.add_parser(name, help=help_text, description=help_text)
        if name == "score":
            _score_arguments(command)
            continue
        if name == "compare":
            _compare_arguments(command)
            continue
        command.add_argument("recipe", nargs="?" if name in ("doctor", "plan") else None, help="YAML file")
        command.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's"
        )
        command.add_argument("--dry-run", action="store_true", help="check the recipe and say what would be done")
        if name == "plan":
            _plan_arguments(command)
        elif name == "inspect":
            _inspect_arguments(command)
        elif name == "serve":
            command.add_argument("--write-config", metavar="FILE", help="write a config for `serve deploy` and end")
        elif name == "evaluate":
            _estimate_arguments(command)
    return parser


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    strategies = ("deal", "best_fit", "streaming", "next_fit", "sorted", "naive", "auto")
    parser.add_argument("--lengths", metavar="FILE.npy", help="tokens of each sequence, in place of a recipe")
    parser.add_argument("--model", metavar="CONFIG.json", help="model whose cost counts (--lengths: Llama-2-7B)")
    parser.add_argument("--capacity", type=int, metavar="N", help="tokens that a rank holds in a micro-step")
    parser.add_argument("--world-size", type=int, metavar="R", help="ranks (--lengths: 8)")
    parser.add_argument("--micro-steps", type=int, metavar="K", help="micro-steps of an optimizer step (--lengths: 1)")
    parser.add_argument("--sp", type=int, metavar="P", help="ranks that share a pack (--lengths: 1)")
    parser.add_argument("--seed", type=int, metavar="S", help="seed of the order (--lengths: 0)")
    parser.add_argument("--strategy", choices=strategies, help="(--lengths: deal)")
    parser.add_argument("--balance", choices=("lock_step", "sums", "none"), help="(--lengths: lock_step)")
    parser.add_argument("--fill", type=float, metavar="F", help="share of the room that deal fills (0.9)")
    parser.add_argument("--tflops", type=float, default=200, metavar="T", help="TFLOP/s of a rank, assumed (200)")
    parser.add_argument("--gpu-memory", type=float, default=80, metavar="GB", help="of a card (80)")
    parser.add_argument("--host-memory", type=float, metavar="GB", help="of a node (1800; on CPUs this machine's)")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="ranks of a node (8; on CPUs all)")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="ZeRO stage of the forecast (--lengths: 3)")
    parser.add_argument(
        "--on-host", action="append", choices=("checkpoints", "optimizer", "parameters"), help="may be given again"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", metavar="plan.npz", help="write the plan")


def _estimate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--estimate", action="store_true", help="tokens and GPU hours of each task; nothing is asked")
    parser.add_argument("--tflops", type=float, default=200, metavar="T", help="TFLOP/s of a GPU, assumed (200)")
    parser.add_argument("--bandwidth", type=float, default=1_500, metavar="GB", help="GB/s of its memory (1500)")


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=("longbench", "agreement"))
    parser.add_argument(
        "predictions", metavar="PATH", help="directory with a file <set>.jsonl a set; agreement: a run's score file"
    )
    parser.add_argument("--reference", metavar="JSONL", help="agreement: lines with case_id and score, of people")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="directory of an evaluated run")
    parser.add_argument(
        "--format", choices=("markdown", "html", "json", "rows"), default="markdown", help="rows: a JSON line a model"
    )


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--example", type=int, default=0, metavar="N", help="row of the store's index, from 0 (0)")
    what.add_argument("--id", metavar="ID", help="id of the example")
    what.add_argument("--pack", metavar="STEP,MICRO,GROUP", help="what a group computes in a micro-step of a step")
    parser.add_argument("--full", action="store_true", help="do not shorten long texts")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "score":
        from longalign_ray.score_command import describe_scores

        print(describe_scores(arguments))
        return 0
    if arguments.command == "compare":
        from longalign_ray.evaluate.comparison import describe_comparison

        print(describe_comparison(arguments.runs, form=arguments.format))
        return 0
    from longalign_ray import stages

    if arguments.command == "doctor":
        return _doctor(arguments)
    if arguments.dry_run:
        return _dry_run(arguments)
    if arguments.command == "plan":
        from longalign_ray.plan_command import describe_plan

        print(describe_plan(arguments))
        return 0
    if arguments.command == "inspect":
        from rich.console import Console

        from longalign_ray.inspect_command import inspect

        console = Console()
        console.print(inspect(arguments, colour=console.is_terminal), soft_wrap=True)
        return 0
    if arguments.command == "evaluate" and arguments.estimate:
        from longalign_ray.estimate_command import describe_estimate

        print(describe_estimate(arguments))
        return 0
    config, run_dir = stages.open_run(arguments.recipe, arguments.overrides)
    if arguments.command == "serve" and arguments.write_config:
        stages.write_serve_config(config, run_dir, Path(arguments.write_config))
        return 0
    result = getattr(stages, arguments.command)(config, run_dir)
    if arguments.command in ("run", "report"):
        from longalign_ray.evaluate.report import summary_table

        print(f"\n{summary_table(result)}\n\nreport: {run_dir.report_html}")
    return 0


def _dry_run(arguments: argparse.Namespace) -> int:
    from longalign_ray.config_load import dump_config, load_config
    from longalign_ray.run_dir import RunDir
    from longalign_ray.stage_state import stage_states

    if arguments.recipe is None:
        raise ConfigError("--dry-run checks a recipe, and none is given: name one, or leave --dry-run out")
    config = load_config(arguments.recipe, arguments.overrides)
    states = stage_states(config, RunDir(Path(config.run_dir)))
    print(dump_config(config) + "\n" + "\n".join(f"{stage:<18} {state}" for stage, state in states))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from longalign_ray.config_load import load_config
    from longalign_ray.doctor import run_checks

    config = load_config(arguments.recipe, arguments.overrides) if arguments.recipe else None
    checks = run_checks(config)
    for check in checks:
        remedy = "" if check.ok else f": {check.remedy}"
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<12} {check.detail}{remedy}")
    return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
