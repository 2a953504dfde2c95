"""The command line: commands by name, and a user's mistake as one line."""

from __future__ import annotations

import sys

import typer

from lorica.commands import check, inspection, learn, look, score, updates
from lorica.commands.options import normalised
from lorica.config import UpdateConfig
from lorica.errors import Interrupted, LoricaError
from lorica.experiments.config import RunConfig
from lorica.forecast.options import ForecastConfig
from lorica.scoring_options import EvalOptions

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # boxes would cut the names of options short
    pretty_exceptions_enable=False,
    help="Keep one language model up to date: learn new data without forgetting what it knows.",
)

BAD_INPUT = 2
"""Exit status for a mistake of the user's."""

_ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Fields of TrainingArguments are options too."""

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


def main() -> None:
    """Run the command line. A user's mistake is one line on standard error and exit status 2."""
    try:
        app(normalised(sys.argv[1:], [UpdateConfig, RunConfig, EvalOptions, ForecastConfig]))
    except LoricaError as error:
        print(f"lorica: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except Interrupted as stop:
        print(f"lorica: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        print("\nlorica: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
