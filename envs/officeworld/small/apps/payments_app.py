"""Money: one account, transfers, requests from others and charges to others."""

from typing import Any, cast

from loopwright.envs.officeworld.api import (
    Api,
    ApiError,
    App,
    Office,
    Param,
    page_of,
    positive,
    require,
)

TO = Param(name="to", kind="int", doc="contact id of the person")
AMOUNT = Param(name="amount", kind="int", doc="whole coins, at least 1")
ID = Param(name="id", kind="int", doc="id of the request")
PAGE = Param(name="page", kind="int", doc="page, counted from 1")


def _balance(office: Office) -> int:
    return cast(int, require(office, "account", 1)["balance"])


def _pay(office: Office, to: int, amount: int) -> None:
    positive(amount)
    require(office, "contacts", to)
    if amount > _balance(office):
        raise ApiError("insufficient_funds", f"the balance is {_balance(office)}")
    office.world.update("account", 1, balance=_balance(office) - amount)
    office.world.insert("transfers", {"to": to, "amount": amount})


def balance(office: Office) -> Any:
    """Coins on the account."""
    return {"balance": _balance(office)}


def send(office: Office, to: int, amount: int) -> None:
    """Pay a contact."""
    _pay(office, to, amount)


def charge(office: Office, to: int, amount: int) -> None:
    """Ask a contact for money."""
    positive(amount)
    require(office, "contacts", to)
    office.world.insert("charges", {"to": to, "amount": amount})


def requests(office: Office) -> Any:
    """Open requests of others, with the name of who asks."""
    return [
        {
            "id": i,
            "from": require(office, "contacts", cast(int, r["person"]))["name"],
            "amount": r["amount"],
        }
        for i, r in office.world.rows("requests", state="open")
    ]


def _open_request(office: Office, id: int) -> tuple[int, int]:
    row = require(office, "requests", id)
    if row["state"] != "open":
        raise ApiError("conflict", f"the request is {row['state']}")
    return cast(int, row["person"]), cast(int, row["amount"])


def accept(office: Office, id: int) -> None:
    """Pay an open request."""
    person, amount = _open_request(office, id)
    _pay(office, person, amount)
    office.world.update("requests", id, state="paid")


def decline(office: Office, id: int) -> None:
    """Refuse an open request."""
    _open_request(office, id)
    office.world.update("requests", id, state="declined")


def history(office: Office, page: int) -> Any:
    """Transfers made, a page at a time."""
    return page_of(office, [{"id": i, **row} for i, row in office.world.rows("transfers")], page)


APP = App(
    name="payments",
    doc="Your account: pay people, charge them, answer their requests.",
    apis=(
        Api(name="balance", doc="Coins on your account.", handler=balance),
        Api(name="send", doc="Pay a contact.", params=(TO, AMOUNT), handler=send, writes=True),
        Api(
            name="charge",
            doc="Ask a contact for money.",
            params=(TO, AMOUNT),
            handler=charge,
            writes=True,
        ),
        Api(name="requests", doc="Open requests: id, who asks, amount.", handler=requests),
        Api(name="accept", doc="Pay an open request.", params=(ID,), handler=accept, writes=True),
        Api(
            name="decline",
            doc="Refuse an open request.",
            params=(ID,),
            handler=decline,
            writes=True,
        ),
        Api(
            name="history",
            doc="Transfers you made, a page at a time.",
            params=(PAGE,),
            handler=history,
        ),
    ),
)
