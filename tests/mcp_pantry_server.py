"""A real MCP server: shelves with things to take. `python mcp_pantry_server.py [PORT]`: over stdio
one world a process; over HTTP a world for each handle that `new_world` gives."""

import random
import sys

from mcp.server.mcpserver import MCPServer

server = MCPServer("pantry")
THINGS = ("salt", "rice", "tea", "oil", "beans", "sugar")
worlds: dict[str, tuple[list[str], list[str]]] = {}


@server.tool()
def new_world(seed: int) -> str:
    """Fill a pantry; its handle."""
    handle = f"w{len(worlds)}" if len(sys.argv) > 1 else ""
    shelves = list(THINGS)
    random.Random(seed).shuffle(shelves)
    worlds[handle] = (shelves, [])
    return handle


@server.tool()
def look(shelf: int, world: str = "") -> str:
    """What lies on a shelf, 1 to 6."""
    if not 1 <= shelf <= len(THINGS):
        raise ValueError(f"there is no shelf {shelf}")
    return worlds[world][0][shelf - 1]


@server.tool()
def take(item: str, world: str = "") -> str:
    """Take a thing."""
    if item not in THINGS:
        raise ValueError(f"there is no {item!r}")
    worlds[world][1].append(item)
    return f"you have {', '.join(worlds[world][1])}"


@server.tool()
def taken(world: str = "") -> str:
    """What has been taken; for grading."""
    return ", ".join(worlds[world][1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run()
