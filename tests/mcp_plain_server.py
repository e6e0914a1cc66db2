"""An MCP server over stdio in the standard library alone, as one in another language would be: the
handshake of 2025-06-18, tools in two pages, a counter. It starts in a tenth of the time."""

import json
import os
import sys
import time

TOOLS = [
    {
        "name": "add",
        "description": "Add to the counter.",
        "inputSchema": {
            "type": "object",
            "properties": {"by": {"type": "integer"}},
            "required": ["by"],
        },
    },
    {
        "name": "mis.behave",
        "description": "Die, hang, or tell the process.",
        "inputSchema": {"type": "object", "properties": {"how": {"type": "string"}}},
    },
    {"name": "read", "inputSchema": {"type": "object"}, "title": "Read the counter"},
]
counter = 0


def call(name, arguments):
    """Run a tool; text, and whether it failed."""
    global counter
    if name == "add":
        by = arguments.get("by")
        if type(by) is not int or abs(by) > 1000:
            return "by must be a whole number up to 1000", True
        counter += by
    how = arguments.get("how")
    if how == "die":
        os._exit(3)
    if how == "hang":
        time.sleep(3600)
    return str(os.getpid() if how == "pid" else counter), False


def answer(method, params):
    """The result of a request, or None for a method it does not know."""
    if method == "initialize":
        info = {"name": "counter", "version": "1"}
        version = "2025-06-18"
        return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
    if method == "tools/list":
        second = params.get("cursor") == "2"
        return {"tools": TOOLS[2:]} if second else {"tools": TOOLS[:2], "nextCursor": "2"}
    if method == "tools/call":
        text, failed = call(params["name"], params.get("arguments", {}))
        return {"content": [{"type": "text", "text": text}], "isError": failed}
    return None


for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    result = answer(message["method"], message.get("params", {}))
    reply = {"jsonrpc": "2.0", "id": message["id"]}
    unknown = {"error": {"code": -32601, "message": "no such method"}}
    print(json.dumps(reply | (unknown if result is None else {"result": result})), flush=True)
