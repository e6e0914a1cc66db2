"""Root of the import name: `loopwright.envs` is the folder `envs/` beside this file.

In a checkout the floors are top-level folders; in a wheel they lie in `loopwright/`. Both import as
`loopwright.<floor>`, so a user's own `envs/` folder never shadows ours
(docs/decisions/0001-import-root.md).
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_INSTALLED = _HERE / "loopwright"
__path__ = [str(_INSTALLED if _INSTALLED.is_dir() else _HERE)]

try:
    __version__ = version("loopwright")
except PackageNotFoundError:  # a checkout with nothing installed
    __version__ = "0.1.0+checkout"
