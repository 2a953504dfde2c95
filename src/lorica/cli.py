"""The command line: commands by name, and a user's mistake as one line."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import Annotated

import typer

from lorica import __version__, processes
from lorica.commands import check, inspection, learn, look, score, updates
from lorica.commands.options import normalised
from lorica.config import UpdateConfig
from lorica.errors import Interrupted, LoricaError
from lorica.experiments.config import RunConfig
from lorica.files import writing
from lorica.forecast.options import ForecastConfig
from lorica.redaction import redacted
from lorica.scoring_options import EvalOptions
from lorica.signals import handled, stop

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # boxes would cut the names of options short
    pretty_exceptions_enable=False,
    help="Keep one language model up to date: learn new data without forgetting what it knows.",
)

BAD_INPUT = 2
"""Exit status for a mistake of the user's, and where the disk is full or a folder read-only."""

ON_SEVERAL = ("train", "run")
"""Commands that several processes carry out together."""

_ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Fields of TrainingArguments are options too."""


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"lorica {__version__}")
        raise typer.Exit


@app.callback()
def _before_any(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of no command of its own."""


app.command("demo")(learn.demo)
app.command("train", context_settings=_ANY_OPTION)(learn.train)
app.command("run", context_settings=_ANY_OPTION)(learn.run)
app.command("eval")(score.evaluate)
app.command("judge")(score.judge)
app.command("inspect")(inspection.inspect)
app.command("check", context_settings=_ANY_OPTION)(check.check)
app.command("audit")(look.audit)
app.command("verify")(look.verify)
app.command("export-update")(updates.export_update)
app.command("apply")(updates.apply)
app.command("report")(look.report)
app.command("list")(look.list_)


def _complain(message: str) -> None:
    """Print on standard error, on a line of its own also where a progress bar has begun one."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


def _tell(message: str) -> None:
    """Print the message in one of the processes that have one to tell."""
    if processes.tells():
        _complain(message)
    else:
        _leave_time()


def _leave_time() -> None:
    """Wait for the process that tells: a launcher ends all of them with the first, and that one may be slower."""
    time.sleep(2)


def _check_launcher(words: list[str]) -> None:
    """Refuse several processes for all commands but ``ON_SEVERAL``."""
    command = next((word for word in words if not word.startswith("-")), None)
    if processes.launched() > 1 and command not in ON_SEVERAL:
        raise LoricaError(processes.alone(f"lorica {command}" if command else "lorica"))


def main() -> None:
    """Run the command line.

    A mistake of the user's, or a full disk, is one line on standard error and exit status 2; so is a signal, and the
    status 128 + its number.
    """
    try:
        _check_launcher(sys.argv[1:])
        with handled(stop), writing(None, "the system refused to read or write"):
            app(normalised(sys.argv[1:], [UpdateConfig, RunConfig, EvalOptions, ForecastConfig]))
    except processes.Elsewhere as error:
        _leave_time()
        if isinstance(error, processes.Ended):  # nor has a launcher told of it, or this one would have ended, too
            _complain(f"lorica: {error}")
        sys.exit(BAD_INPUT)
    except LoricaError as error:
        _tell(f"lorica: {error}")
        sys.exit(BAD_INPUT)
    except Interrupted as stopped:
        if stopped.checkpoint is None or not int(os.environ.get("RANK") or 0):  # all stop with a checkpoint
            _complain(f"lorica: {stopped}")
        sys.exit(128 + stopped.signum)
    except Exception:  # a defect of Lorica: with its traceback, but without the tokens that may stand in it
        _tell(redacted(traceback.format_exc()).rstrip())
        sys.exit(1)


if __name__ == "__main__":
    main()
