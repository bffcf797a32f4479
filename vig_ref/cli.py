"""The command line: `vig-ref COMMAND`, also `python -m vig_ref COMMAND`.

A command is a module with `add_arguments(parser)` and `run(options) -> exit code`.
It is imported when it is called, so that no command needs what another one needs.
"""

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from vig_ref import __version__


class Command(NamedTuple):
    """Where a command is, the extra that brings what it imports, and one line of help."""

    module: str
    extra: str
    help: str


COMMANDS = {
    "demo": Command("vig_ref.demo", "demo", "see the layers agree, then a small ViG learn handwritten digits"),
    "init": Command("vig_ref.initialisation", "demo", "train from two initialisations and compare"),
    "see": Command("vig_ref.see", "demo", "attention maps and effective receptive fields as pictures"),
    "verify": Command("vig_ref.verify", "demo", "check every layer on this machine, before you trust it"),
    "tables": Command("vig_ref.tables", "demo", "the paper's sizes and costs beside what is counted here"),
    "bench": Command("vig_ref.bench", "demo", "time and memory of the operator or of models, beside their peers"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code, 0 if all is well. Without arguments it prints the help."""
    options = _parser().parse_args((sys.argv[1:] if argv is None else argv) or ["--help"])
    module = _load(options.command)
    parser = argparse.ArgumentParser(prog=f"vig-ref {options.command}", description=COMMANDS[options.command].help)
    module.add_arguments(parser)
    return module.run(parser.parse_args(options.arguments))


def positive(text: str) -> int:
    """A whole number of at least 1, as the value of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def sizes(text: str, count: int, expected: str) -> list[int]:
    """So many positive integers with commas between them, as the value of an option."""
    found = [int(n) if n.isdecimal() else 0 for n in text.split(",")]
    if len(found) != count or min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected {expected}; got {text!r}")
    return found


def make_folders(command: str, out: Path, record: Path | None = None) -> None:
    """Make the folders of `--out` and of `--record`, before any work is done; refuse what cannot be written to."""
    for option, folder in [("--out", out), *([("--record", record.parent)] if record else [])]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            expected = f"{option}: expected a folder that can be written to, got {folder} ({error.strerror})"
            raise SystemExit(f"{command}: {expected}; give another path") from error
    if record and record.is_dir():
        raise SystemExit(f"{command}: --record: expected a file, got the folder {record}; give the name of a file")


def read_record(command: str, path: Path, key: str) -> dict[str, Any]:
    """What `--record` of the same command wrote, for its `--report`; it has this key."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except ValueError:
        reason = "is no JSON"
    else:
        of = found.get("command") if isinstance(found, dict) else None
        ours = f"{of} ".startswith(f"{command} ")
        if ours and key in found:
            return found
        reason = f"has no {key!r}" if ours else f"is of the command {of!r}"
    expected = f"expected a file that {command} --record FILE wrote"
    raise SystemExit(f"{command}: --report: {expected}, got {path}, which {reason}; give such a file")


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<10}{command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="vig-ref", description="ViG in three layers that agree.", epilog=f"commands:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"vig-ref {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="see vig-ref COMMAND --help")
    return parser


def _load(name: str) -> ModuleType:
    command = COMMANDS[name]
    try:
        return importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "vig_ref":
            raise  # a fault of this package, not of its installation
        raise SystemExit(
            f"vig-ref {name}: the module {error.name!r} is missing; install the extra {command.extra!r}: "
            f"pip install 'vig_ref[{command.extra}]', in a clone pip install -c constraints.txt -e '.[{command.extra}]'"
        ) from error
