"""The command line: ``python -m bnrewrite demo | report | export | env``.

A wrong argument prints one line on standard error and exits with code 2. Other exit codes: 1 for a
failure, 130 for an interrupt, and 141 for a closed pipe (``| head``), as in other programs.
"""

import argparse
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import bnrewrite
from bnrewrite.commandline import MODEL_HELP, CommandError, load_model
from bnrewrite.report_page import to_html

Command = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code."""
    parser, commands = make_parser()
    args = parser.parse_args(argv)
    try:
        code = commands[args.command](args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever reads has read enough; Python would write the rest again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except CommandError as error:
        print(f"{parser.prog} {args.command}: error: {error}", file=sys.stderr)
        return error.code
    except bnrewrite.BnRewriteError as error:
        print(f"{parser.prog} {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{parser.prog} {args.command}: interrupted", file=sys.stderr)
        return 130


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, Command]]:
    """The parser of all subcommands, and what runs each of them."""
    parser = _Parser(
        prog="bnrewrite",
        description="Distributed BatchNorm for PyTorch, by graph rewriting.",
    )
    parser.add_argument("--version", action="version", version=bnrewrite.__version__)
    add = parser.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser
    commands: dict[str, Command] = {"report": _report, "env": _env}
    for name, module, summary in (
        ("demo", "bnrewrite.demo.command", "train, compile and export on local ranks"),
        ("export", "bnrewrite.export.command", "write the eval graph of a model as ONNX"),
    ):
        command = importlib.import_module(module)
        command.add_arguments(add(name, help=summary, description=summary))
        commands[name] = command.run
    summary = "show what convert() rewrites in a model, and what it leaves"
    report = add("report", help=summary, description=summary)
    report.add_argument("model", metavar="MODULE:FACTORY", help=MODEL_HELP)
    report.add_argument("--mode", default="sync", help="mode of all sites (default: %(default)s)")
    report.add_argument("--sites", action="store_true", help="add one line per site")
    report.add_argument("--json", action="store_true", help="print JSON instead of text")
    report.add_argument("--html", metavar="FILE", help="also write a self-contained HTML page")
    summary = "print versions, devices and a self-check, for bug reports"
    env = add("env", help=summary, description=summary)
    env.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser, commands


def _report(args: argparse.Namespace) -> int:
    model = load_model(args.model)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = bnrewrite.report(bnrewrite.convert(model, mode=args.mode))
    except ValueError as error:
        raise CommandError(str(error)) from error
    if args.html is not None:
        try:
            Path(args.html).write_text(to_html(report), encoding="utf-8")
        except OSError as error:
            raise CommandError(f"--html {args.html} cannot be written: {error.strerror}") from error
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    if args.sites and not args.json:
        print(f"\n{report.table()}")
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return 0


def _env(args: argparse.Namespace) -> int:
    from bnrewrite import environment

    try:
        checks = environment.self_check()
    except ValueError as error:
        raise CommandError(str(error)) from error
    if args.json:
        print(json.dumps(environment.to_dict(checks), indent=2))
    else:
        print(environment.describe(checks))
    return 0 if all(check.passed for check in checks) else 1
