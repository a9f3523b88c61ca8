"""The command line: finds the command, hands it its arguments, and turns errors into one line and an exit code.

Exit codes: 0 fine, 1 the work failed, 2 the input is wrong, 130 interrupted. A command is a module in
`marval_rl.cli` with `add_arguments(parser)` and `run(args, extra)`; it is imported only when it is run, so that
`marval-rl --help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from marval_rl import __version__
from marval_rl.errors import MarvalError, nearest
from marval_rl.launched import check_company, is_started_here, launched_processes, record_error
from marval_rl.paths import path_or_id

PROGRAM = "marval-rl"
READER_GONE = 141  # as shells report a program that SIGPIPE ended
STDOUT = 1  # its file descriptor


@dataclass(frozen=True)
class Command:
    """Where a command lives and its line in the overview.

    takes_recipe: `--key value` settings may follow its recipe. can_launch: it may run in several processes.
    """

    module: str
    help: str
    takes_recipe: bool = False
    can_launch: bool = False


COMMANDS = {
    "demo": Command("marval_rl.cli.demo", "teacher, student, RL and report on MNIST"),
    "pretrain": Command("marval_rl.cli.pretrain", "train a MAR teacher", takes_recipe=True, can_launch=True),
    "distill": Command(
        "marval_rl.cli.distill", "distil a teacher into a one-step student", takes_recipe=True, can_launch=True
    ),
    "train": Command(
        "marval_rl.cli.train",
        "RL on a student: method grpo or reward_backprop",
        takes_recipe=True,
        can_launch=True,
    ),
    "convert": Command("marval_rl.cli.convert", "official MAR or VAE weights to a model folder, and back"),
    "cache": Command("marval_rl.cli.cache", "encode a data set by the VAE, once", takes_recipe=True),
    "sample": Command("marval_rl.cli.sample", "generate images with a model"),
    "evaluate": Command(
        "marval_rl.cli.evaluate", "measure quality, diversity, rewards and speed of a model", can_launch=True
    ),
    "report": Command("marval_rl.cli.report", "write one HTML page about one or several runs"),
    "rewards": Command("marval_rl.cli.rewards", "list, score with, check or serve rewards"),
    "bench": Command("marval_rl.cli.bench", "time a student against its teacher"),
    "env": Command("marval_rl.cli.env", "print versions and hardware, for bug reports"),
}
ALONE = ("demo", "convert", "sample", "report", "bench")  # several processes would all write the same files


class UsageError(ValueError):
    """The command line itself is wrong (exit code 2)."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and raises UsageError where argparse would print and exit.

    An option of type Path has ~ and $VARIABLE replaced: no shell does it in `--output=~/a.png`. One of type
    `path_or_id` too, which stays text.
    """

    def __init__(self, **options: Any):
        super().__init__(**{**options, "allow_abbrev": False})
        self.register("type", Path, lambda text: Path(path_or_id(text)))

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; `argv` defaults to the arguments of the process."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv  # wherever it stands; and known even where parsing fails
    argv = [argument for argument in argv if argument != "--debug"]
    try:
        code = run_command(argv, debug)
        sys.stdout.flush()  # here, where a reader that has gone is noticed
        return code
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return _fail(130, "interrupted", debug)
    except MarvalError as error:  # RecipeError, the user's own, is a ValueError as well
        return _fail(2 if isinstance(error, ValueError) else 1, _message_of(error), debug)
    except ValueError as error:
        return _fail(2, str(error) or type(error).__name__, debug)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return READER_GONE
        return _fail(1, _describe_os_error(error), debug)
    except Exception as error:
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return _fail(1, f"unexpected error: {message} (run again with --debug for the traceback)", debug)


def run_command(argv: list[str], debug: bool = False) -> int:
    """Runs one command, letting its errors through, and returns the exit code."""
    position = next((i for i, argument in enumerate(argv) if not argument.startswith("-")), len(argv))
    overview = _overview_parser()
    overview.parse_args(argv[:position])  # --help, --version, or an error
    if position == len(argv):
        overview.print_help()
        return 2
    name, arguments = argv[position], argv[position + 1 :]
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}{_hint(PROGRAM, name, COMMANDS)}")
    command = COMMANDS[name]
    planned = None
    if command.can_launch:
        left = _launch(name, arguments, debug)
        if left is None:
            return 0
        arguments, planned = left
    elif name in ALONE:
        check_company(1)
    module = importlib.import_module(command.module)
    parser = CommandParser(prog=f"{PROGRAM} {name}", description=module.__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    module.add_arguments(parser)
    options = _options(parser)
    if not command.takes_recipe:
        _check_options(parser.prog, arguments, options)  # else argparse would say that the misspelt option is missing
    args, extra = parser.parse_known_args(arguments)
    if command.takes_recipe:
        _check_recipe(name, args.recipe, arguments, options)
        args.recipe = _find_recipe(args.recipe)
    elif extra:
        raise UsageError(f"unexpected argument {extra[0]!r} (see {parser.prog} --help)")
    if command.can_launch and command.takes_recipe and args.dry_run:
        from marval_rl.trainers.arguments import planned_for

        with planned_for(planned or launched_processes()):
            module.run(args, extra)
    else:
        module.run(args, extra)
    return 0


def _launch(name: str, arguments: list[str], debug: bool) -> tuple[list[str], int | None] | None:
    """Runs the command in several processes if the arguments ask for that, and returns None. Otherwise returns the
    arguments left for this process, and how many processes a dry run is to count with."""
    from marval_rl.cli.launch import add_launch_arguments, plan_launch

    parser = CommandParser(prog=f"{PROGRAM} {name}", add_help=False)
    add_launch_arguments(parser)
    options, others = parser.parse_known_args(arguments)
    launch = None if {"-h", "--help"} & set(arguments) else plan_launch(options)
    if launch is None:
        return arguments, None
    if launch.settings and not COMMANDS[name].takes_recipe:
        raise UsageError(f"{name} cannot do what --accelerate_config asks for: {', '.join(launch.settings)}")
    others = launch.with_settings(others)
    if "--dry_run" in others:
        print(launch.describe([name, *others]) + "\n")
        return others, launch.num_processes
    from marval_rl.cli.processes import run_processes  # imports torch

    run_processes(launch, [name, *others, *(["--debug"] if debug else [])])
    return None


def _overview_parser() -> CommandParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    parser = CommandParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--version] [--debug] COMMAND ...",
        description="Reinforcement learning for masked auto-regressive image generators.",
        epilog="\n".join(["commands:", *lines, "", f"{PROGRAM} COMMAND --help tells more about one of them."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _check_options(prog: str, arguments: list[str], options: set[str]) -> None:
    """Raises UsageError for an unknown option, with the nearest known one."""
    for argument in arguments:
        name = argument.split("=")[0]
        if name.startswith("--") and name not in options:
            raise UsageError(f"unknown option {name!r}{_hint(prog, name, options)}")


def _check_recipe(name: str, recipe: str | None, arguments: list[str], options: set[str]) -> None:
    """Raises UsageError if the recipe is missing, or may be the value of a setting that was written before it."""
    if recipe is None:
        from marval_rl.recipes.reading import find_recipes, shipped_recipes

        found = ", ".join(map(str, find_recipes()))
        here = f"; recipes here: {found}" if found else ""
        raise UsageError(
            f"{name} needs a recipe: {PROGRAM} {name} RECIPE.yaml [--key value ...]{here}; shipped: "
            f"{', '.join(shipped_recipes())}"
        )
    for argument in arguments[: arguments.index(recipe)]:
        if argument.startswith("--") and argument.split("=")[0] not in options:
            raise UsageError(f"the recipe comes first: {PROGRAM} {name} RECIPE.yaml {argument} ...")


def _find_recipe(given: str) -> str:
    """The path of the recipe; where it is not as it was written, the first process says which file is read."""
    from marval_rl.recipes.reading import resolve_recipe

    path = resolve_recipe(given)
    if path != given and os.environ.get("RANK", "0") == "0":
        print(f"recipe: {path}")
    return path


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """All option names of a parser and of the parsers below it."""
    names: set[str] = set()
    for action in parser._actions:
        names.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                names |= _options(child)
    return names


def _hint(prog: str, name: str, known: Iterable[str]) -> str:
    return nearest(name, sorted(known)) or f" (see {prog} --help)"


def _message_of(error: MarvalError) -> str:
    """The message; torch wraps that of a data worker's error in the worker's traceback, which ends with it."""
    message = str(error)
    if message.startswith("Caught ") and "\nOriginal Traceback" in message:
        return message.rsplit(f"{type(error).__name__}: ", 1)[-1]
    return message


def _describe_os_error(error: OSError) -> str:
    """ "runs/a: Permission denied"; libraries also raise OSError with nothing but a text."""
    if error.strerror is None:
        return str(error) or type(error).__name__
    files = [str(file) for file in (error.filename, error.filename2) if file is not None]
    return f"{' -> '.join(files)}: {error.strerror}" if files else error.strerror


def _reader_has_gone() -> bool:
    """Whether nobody reads our output any more, as behind `| head`; then nothing more is written to it."""
    poll = select.poll()
    poll.register(STDOUT, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), STDOUT)  # Python flushes once more at its end
    return True


def _fail(code: int, message: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    message = " ".join(message.split())
    record_error(message)
    if not is_started_here():  # else the process that started this one prints it, once for all processes
        print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return code
