"""The `diffense` command. One module per command; a command holds no logic that the Python API lacks."""

import importlib
import os
import sys
from typing import Final

import typer

from diffense.errors import DiffenseError
from diffense.text import printable

COMMANDS: Final = {
    "fit": "diffense.cli.fit",
    "score": "diffense.cli.score",
    "calibrate": "diffense.cli.calibrate",
    "inspect": "diffense.cli.inspect",
    "export": "diffense.cli.export",
    "plans": "diffense.cli.plans",
    "serve": "diffense.cli.serve",
    "scan": "diffense.cli.scan",
    "demo": "diffense.cli.demo",
    "doctor": "diffense.cli.doctor",
    "evaluate": "diffense.cli.evaluate",
    "bench": "diffense.cli.bench",
}
ERROR_EXIT: Final = 2
TRACEBACK_VARIABLE: Final = "DIFFENSE_TRACEBACK"

app = typer.Typer(
    name="diffense",
    help="Guard an image classifier against backdoor triggers, where it is served.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
for _name, _module in COMMANDS.items():
    app.command(_name)(importlib.import_module(_module).command)


def main() -> None:
    """Run the command line; an error that the user can act on ends in one line and exit code 2."""
    try:
        app()
    except DiffenseError as error:
        print(f"diffense: {printable(str(error))}", file=sys.stderr)
        sys.exit(ERROR_EXIT)
    except Exception as error:  # a defect of ours: 1 would read as "flagged" in a script
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        kind = type(error).__name__
        print(f"diffense: unexpected {kind}: {printable(str(error))}; {TRACEBACK_VARIABLE}=1 shows where", file=sys.stderr)
        sys.exit(ERROR_EXIT)
