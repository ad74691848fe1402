"""The command line: ``python -m bnrewrite demo | report | export | env``.

A wrong argument is one line on standard error and exit code 2; a failure is exit code 1; an
interrupt is exit code 130, and a reader that leaves (``| head``) 141, as for other programs.
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
from bnrewrite.commandline import CommandError, load_model
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
        description="Distributed BatchNorm for PyTorch by rewriting graphs.",
    )
    parser.add_argument("--version", action="version", version=bnrewrite.__version__)
    add = parser.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser
    commands: dict[str, Command] = {"report": _report, "env": _env}
    for name, module, summary in (
        ("demo", "bnrewrite.demo.command", "train, compile and export on two local ranks"),
        ("export", "bnrewrite.export.command", "write the eval graph of a model as ONNX"),
    ):
        command = importlib.import_module(module)
        command.add_arguments(add(name, help=summary, description=summary))
        commands[name] = command.run
    report = add("report", help="what convert() does to a model, and what it leaves")
    report.add_argument("model", metavar="MODULE:FACTORY", help="called without arguments")
    report.add_argument("--mode", default="sync", help="mode of all sites (default %(default)s)")
    report.add_argument("--sites", action="store_true", help="add a line for each site")
    report.add_argument("--json", action="store_true", help="print JSON instead of text")
    report.add_argument("--html", metavar="FILE", help="write one self-contained page too")
    env = add("env", help="versions, devices and a self-check, for bug reports")
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
