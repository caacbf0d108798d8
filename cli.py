"""The front door, `kartina paint | train | models | ...`. The commands stand with the rooms that do their work."""

import sys

import typer

from .pipeline.commands import app as painting
from .pipeline.editing_commands import app as editing
from .training.commands import app as training
from .training.data.commands import app as data
from .training.show.commands import app as show

app = typer.Typer(help="kartina: captions to pictures, and every model on the way.", no_args_is_help=True)
app.add_typer(painting)
app.add_typer(editing)
app.add_typer(training)
app.add_typer(data, name="data")
app.add_typer(show, name="show")


def main() -> None:
    """Runs the command line: wrong input gives one clear line and exit code 2."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        from .pipeline.terminal import printable

        typer.echo(f"kartina: {printable(' '.join(str(error).split()))}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
