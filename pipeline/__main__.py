"""`python pipeline "a caption"` from a checkout does what `kartina paint "a caption"` does.

It runs the package that this file lies in, never another installed copy: the folder above becomes `kartina`, whatever
its name. Without the dependencies it says so in one line and exits with 2. It knows nothing of painting; `cli.py` does.
"""

import importlib.util
import sys
from pathlib import Path

ROOM = Path(__file__).resolve().parent
REQUIRED = ("torch", "safetensors", "yaml", "pydantic", "typer", "rich", "PIL", "numpy", "tokenizers")


def _map_package(root: Path) -> None:
    """Makes `kartina` mean the package at `root`, for every import that follows."""
    spec = importlib.util.spec_from_file_location(
        "kartina", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    for name in [name for name in sys.modules if name == "kartina" or name.startswith("kartina.")]:
        del sys.modules[name]
    sys.modules["kartina"] = module
    spec.loader.exec_module(module)


def main() -> None:
    """Paints the captions of the command line. Exits with 2 when a dependency is missing."""
    # `python pipeline` puts this room on the path, where `images` or `recipe` would hide an installed package.
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != ROOM]
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"kartina: not installed: {', '.join(missing)}; run `make install` once in {ROOM.parent}", file=sys.stderr
        )
        raise SystemExit(2)
    if __package__ != "kartina.pipeline":
        _map_package(ROOM.parent)
    from kartina.cli import main as command_line

    sys.argv = ["kartina", "paint", *sys.argv[1:]]
    command_line()


if __name__ == "__main__":
    main()
