"""Stub: one list of notes in each session."""

import json
from typing import Any

from nemo_gym.base_resources_server import BaseResourcesServerConfig, SimpleResourcesServer

NOTES: dict[str, list[str]] = {}


class NotesConfig(BaseResourcesServerConfig):
    """Nothing of its own."""


class NotesServer(SimpleResourcesServer):
    """Write notes."""

    config: NotesConfig

    def seed(self, session: str) -> dict[str, Any]:
        """An empty list."""
        NOTES[session] = []
        return {}

    def tool(self, session: str, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """One tool; what it does not take is said in its three ways."""
        if path != "notes_write":
            return {"detail": "Not Found"}, 404
        if set(body) != {"text"}:
            return {"detail": "text: field required"}, 422
        if body["text"] == "crash":
            return {"detail": "Internal Server Error"}, 500
        if not isinstance(body["text"], str):
            return {"output": "Error executing tool 'notes_write': not text"}, 200
        NOTES[session].append(body["text"])
        return {"output": {"notes": NOTES[session]}}, 200

    def verify(self, body: dict[str, Any]) -> float:
        """The same notes as the truth's, whatever else was tried."""
        calls = [item for item in body["response"]["output"] if item["type"] == "function_call"]
        done = [json.loads(call["arguments"]).get("text") for call in calls]
        truth = [json.loads(call["arguments"])["text"] for call in body["ground_truth"]]
        return float([text for text in done if isinstance(text, str)] == truth)
