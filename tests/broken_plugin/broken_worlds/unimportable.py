"""A plugin whose own requirement is missing."""

import a_package_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401


class World:
    """Never reached."""
