"""kartina turns a caption into a picture, and trains every model on the way.

The public names load on first use, so `import kartina` is quick and imports no torch:

    from kartina import TextToImage

No module-level relative import stands here: pytest runs this file a second time under another name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kartina.pipeline.text_to_image import Painting, TextToImage

__version__ = "0.1.0"
__all__ = ["Painting", "TextToImage", "__version__"]

_HOMES = {"TextToImage": "pipeline.text_to_image", "Painting": "pipeline.text_to_image"}


def __getattr__(name: str) -> Any:
    """Imports a public name from its room when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
