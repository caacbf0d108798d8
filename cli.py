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
    """Runs the command line: wrong input, or too little memory, gives one clear line and exit code 2."""
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _lacks_memory(error):
            raise
        from .pipeline.terminal import printable

        typer.echo(f"kartina: {printable(' '.join(str(error).split()))}", err=True)
        sys.exit(2)


def _lacks_memory(error: RuntimeError) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    return should_reduce_batch_size(error) and "cuDNN" not in str(error)  # which may have other reasons


if __name__ == "__main__":
    main()
