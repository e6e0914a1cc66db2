"""Short messages: an inbox in pages, and sending."""

from typing import Any, cast

from loopwright.envs.officeworld.api import Api, App, Office, Param, page_of, require

PAGE = Param(name="page", kind="int", doc="page, counted from 1")
ID = Param(name="id", kind="int", doc="id of the message")


def inbox(office: Office, page: int) -> Any:
    """Messages received, with the sender's name, a page at a time."""
    rows = [
        {
            "id": i,
            "from": require(office, "contacts", cast(int, r["sender"]))["name"],
            "text": r["text"],
        }
        for i, r in office.world.rows("inbox")
    ]
    return page_of(office, rows, page)


def sent(office: Office, page: int) -> Any:
    """Messages sent, a page at a time."""
    return page_of(office, [{"id": i, **row} for i, row in office.world.rows("sent")], page)


def send(office: Office, to: int, text: str) -> None:
    """Send a message to a contact."""
    require(office, "contacts", to)
    office.world.insert("sent", {"to": to, "text": text})


def delete(office: Office, id: int) -> None:
    """Delete a received message."""
    require(office, "inbox", id)
    office.world.remove("inbox", id)


APP = App(
    name="messages",
    doc="Short messages from and to your contacts.",
    apis=(
        Api(
            name="list",
            doc="Messages received: id, sender, text, in pages.",
            params=(PAGE,),
            handler=inbox,
        ),
        Api(name="sent", doc="Messages you sent, in pages.", params=(PAGE,), handler=sent),
        Api(
            name="send",
            doc="Send a message to a contact.",
            params=(
                Param(name="to", kind="int", doc="contact id of the person"),
                Param(name="text", kind="str", doc="the text"),
            ),
            handler=send,
            writes=True,
        ),
        Api(
            name="delete",
            doc="Delete a received message.",
            params=(ID,),
            handler=delete,
            writes=True,
        ),
    ),
)
