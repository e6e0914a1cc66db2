"""A tool that must be asked."""

import verifiers.v1 as vf


class BookToolset(vf.Toolset[vf.ToolsetConfig]):
    """A book of numbers."""

    TOOL_PREFIX = "book"

    @vf.tool
    def look_up(self, name: str) -> str:
        """The number of a name."""
        return str(sum(map(ord, name)))


if __name__ == "__main__":
    BookToolset.run()
