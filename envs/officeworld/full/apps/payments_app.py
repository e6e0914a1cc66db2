"""Money: a wallet, transfers, requests from and to others, cards, saving pots."""

from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, Office, Param
from loopwright.envs.officeworld.columns import TODAY, Move, choice, day, flag, number, text
from loopwright.envs.officeworld.full.declare import OfficeApp, Seeding
from loopwright.envs.officeworld.resources import Resource
from loopwright.envs.officeworld.state import Row, Value

STATES = ("open", "paid", "declined", "cancelled")
TRANSFER = Resource(
    name="transfer",
    plural="transfers",
    table="transfers",
    doc="money that changed hands",
    verbs=("list", "search", "show", "count"),
    fields=(
        choice("direction", "from or to you", ("in", "out"), default="out"),
        text("email", "address of the other person", refers="email", filters=True),
        number("amount", "whole coins"),
        text("note", "what it was for", default=""),
        day("date", "when", default=TODAY),
        flag("private", "whether only the two of you see it"),
        flag("liked", "whether you liked it", listed=False),
    ),
    dated="date",
    flags={"liked": ("like", "unlike"), "private": ("hide", "publish")},
)
REQUEST = Resource(
    name="request",
    plural="requests",
    table="requests",
    doc="a request for money",
    verbs=("list", "search", "show", "count"),
    fields=(
        choice("direction", "in: they ask you; out: you ask them", ("in", "out"), default="out"),
        text("email", "address of the other person", refers="email", filters=True),
        number("amount", "whole coins", low=1),
        text("note", "what it is for", default=""),
        choice("state", "what became of it", STATES, default="open"),
        day("date", "when", default=TODAY),
        number("reminders", "how often it was recalled", default=0, listed=False),
    ),
    dated="date",
)
CARD = Resource(
    name="card",
    plural="cards",
    table="cards",
    doc="a bank card of yours",
    verbs=("list", "show", "create", "update", "delete"),
    fields=(
        text("name", "what you call it"),
        text("digits", "the last four digits"),
        number("expires", "year of its end", low=2031, high=2045),
        number("limit", "most coins a month", default=1000, low=0),
        flag("frozen", "whether it is locked"),
        number("money", "coins behind it", default=0, given="never"),
    ),
    flags={"frozen": ("freeze", "unfreeze")},
)
POT = Resource(
    name="pot",
    plural="pots",
    table="pots",
    doc="a saving pot",
    fields=(
        text("name", "what you save for"),
        number("goal", "coins you want in it", low=1),
        number("saved", "coins in it", default=0, given="never"),
        day("due", "until when", default="2032-12-31"),
    ),
    guard=lambda _office, row: None,
)
AUTOPAY = Resource(
    name="standing_order",
    plural="standing_orders",
    table="standing_orders",
    doc="a payment made every month",
    fields=(
        text("email", "who gets it", refers="email", filters=True),
        number("amount", "whole coins", low=1),
        number("day_of_month", "1 to 28", low=1, high=28),
        text("note", "what for", default=""),
        choice(
            "state", "whether it is paid", ("active", "paused"), default="active", given="never"
        ),
    ),
    moves=(
        Move(verb="pause", field="state", to="paused"),
        Move(verb="resume", field="state", to="active"),
    ),
)


def balance(office: Office) -> int:
    """Coins in the wallet."""
    row: Any = office.world.get("wallet", 1)
    return int(row["balance"])


def _change(office: Office, amount: int) -> None:
    now = balance(office)
    if now + amount < 0:
        raise ApiError("insufficient_funds", f"the wallet holds {now} coins")
    office.world.update("wallet", 1, balance=now + amount)


def show_balance(office: Office) -> Any:
    """Coins in the wallet."""
    return {"balance": balance(office)}


def send_money(office: Office, email: str, amount: int, note: str, private: bool) -> Any:
    """Pay somebody."""
    given: dict[str, Value] = {"email": email, "amount": amount, "note": note, "private": private}
    made = TRANSFER.add(office, given)
    try:
        _change(office, -amount)
    except ApiError:
        office.world.remove("transfers", made)
        raise
    return {"id": made}


def request_money(office: Office, email: str, amount: int, note: str) -> Any:
    """Ask somebody for money."""
    return {"id": REQUEST.add(office, {"email": email, "amount": amount, "note": note})}


def _open(office: Office, request_id: int, direction: str) -> Row:
    row = REQUEST.row(office, request_id)
    if row["direction"] != direction:
        raise ApiError("forbidden", "this is up to the other person")
    if row["state"] != "open":
        raise ApiError("conflict", f"the request is {row['state']}")
    return row


def accept_request(office: Office, request_id: int) -> Any:
    """Pay what somebody asks."""
    row: Any = _open(office, request_id, "in")
    sent = send_money(office, row["email"], row["amount"], row["note"], False)
    office.world.update("requests", request_id, state="paid")
    return sent


def decline_request(office: Office, request_id: int) -> None:
    """Refuse what somebody asks."""
    _open(office, request_id, "in")
    office.world.update("requests", request_id, state="declined")


def cancel_request(office: Office, request_id: int) -> None:
    """Take an own request back."""
    _open(office, request_id, "out")
    office.world.update("requests", request_id, state="cancelled")


def remind_request(office: Office, request_id: int) -> None:
    """Recall an own request."""
    row: Any = _open(office, request_id, "out")
    office.world.update("requests", request_id, reminders=row["reminders"] + 1)


def _card(office: Office, card_id: int) -> Any:
    row: Any = CARD.row(office, card_id)
    if row["frozen"]:
        raise ApiError("forbidden", "the card is frozen")
    return row


def top_up(office: Office, card_id: int, amount: int) -> None:
    """From a card into the wallet."""
    row = _card(office, card_id)
    if row["money"] < amount:
        raise ApiError("insufficient_funds", f"the card has {row['money']} coins")
    office.world.update("cards", card_id, money=row["money"] - amount)
    _change(office, amount)


def withdraw(office: Office, card_id: int, amount: int) -> None:
    """From the wallet onto a card."""
    row = _card(office, card_id)
    _change(office, -amount)
    office.world.update("cards", card_id, money=row["money"] + amount)


def save_into_pot(office: Office, pot_id: int, amount: int) -> None:
    """From the wallet into a pot."""
    row: Any = POT.row(office, pot_id)
    _change(office, -amount)
    office.world.update("pots", pot_id, saved=row["saved"] + amount)


def take_from_pot(office: Office, pot_id: int, amount: int) -> None:
    """From a pot into the wallet."""
    row: Any = POT.row(office, pot_id)
    if row["saved"] < amount:
        raise ApiError("insufficient_funds", f"the pot holds {row['saved']} coins")
    office.world.update("pots", pot_id, saved=row["saved"] - amount)
    _change(office, amount)


NOTES = (
    "lunch",
    "concert tickets",
    "taxi",
    "groceries",
    "rent share",
    "birthday gift",
    "climbing hall",
    "pizza night",
)


def seed(s: Seeding) -> None:
    """A wallet, two hundred transfers, requests both ways, cards, pots."""
    s.fill(
        "cards",
        (
            {
                "name": name,
                "digits": str(s.rng.randint(1000, 9999)),
                "expires": s.rng.randint(2032, 2040),
                "limit": s.rng.choice((500, 1000, 2000)),
                "money": s.rng.randint(300, 900),
                "frozen": False,
            }
            for name in ("Everyday", "Travel", "Shared")
        ),
    )
    s.tables["wallet"] = {1: {"balance": s.rng.randint(900, 1500)}}
    s.fill(
        "transfers",
        sorted(
            (
                {
                    "direction": s.rng.choice(("in", "out")),
                    "email": s.rng.choice(s.people)["email"],
                    "amount": s.rng.randint(3, 120),
                    "note": s.rng.choice(NOTES),
                    "date": s.day(-150, 0),
                    "private": s.rng.random() < 0.3,
                    "liked": s.rng.random() < 0.1,
                }
                for _ in range(200)
            ),
            key=lambda row: str(row["date"]),
        ),
    )
    s.fill(
        "requests",
        sorted(
            (
                {
                    "direction": s.rng.choice(("in", "out")),
                    "email": p["email"],
                    "amount": s.rng.randint(3, 60),
                    "note": s.rng.choice(NOTES),
                    "state": s.rng.choice(("open", "open", "paid", "declined")),
                    "date": s.day(-60, 0),
                }
                for p in s.rng.sample(s.people, 36)
            ),
            key=lambda row: str(row["date"]),
        ),
    )
    s.fill(
        "pots",
        (
            {"name": name, "goal": s.rng.randint(3, 20) * 100, "saved": s.rng.randint(30, 250)}
            for name in ("Bicycle", "Summer trip", "New laptop")
        ),
    )
    s.fill(
        "standing_orders",
        (
            {
                "email": p["email"],
                "amount": s.rng.randint(10, 90),
                "day_of_month": s.rng.randint(1, 28),
                "note": note,
            }
            for p, note in zip(
                s.rng.sample(s.people, 3), ("choir fee", "storage room", "loan"), strict=True
            )
        ),
    )


EMAIL = Param(name="email", kind="str", doc="email address of a person you know")
AMOUNT = Param(name="amount", kind="int", doc="whole coins", low=1)
NOTE = Param(name="note", kind="str", doc="what it is for", default="")
PRIVATE = Param(
    name="private", kind="bool", doc="whether only the two of you see it", default=False
)
REQUEST_ID, CARD_ID, POT_ID = REQUEST.id_param, CARD.id_param, POT.id_param
APP = OfficeApp(
    name="payments",
    doc="Money: your wallet, transfers, requests from and to others, cards, pots, standing orders.",
    resources=(TRANSFER, REQUEST, CARD, POT, AUTOPAY),
    tables=("wallet",),
    seed=seed,
    apis=(
        Api(
            name="show_balance",
            doc="Coins in your wallet.",
            handler=show_balance,
            returns="balance",
        ),
        Api(
            name="send_money",
            doc="Pay somebody from your wallet.",
            params=(EMAIL, AMOUNT, NOTE, PRIVATE),
            handler=send_money,
            writes=True,
            returns="id",
        ),
        Api(
            name="request_money",
            doc="Ask somebody for money.",
            params=(EMAIL, AMOUNT, NOTE),
            handler=request_money,
            writes=True,
            returns="id",
        ),
        Api(
            name="accept_request",
            doc="Pay an open request from your wallet.",
            params=(REQUEST_ID,),
            handler=accept_request,
            writes=True,
            returns="id of the transfer",
        ),
        Api(
            name="decline_request",
            doc="Refuse an open request to you.",
            params=(REQUEST_ID,),
            handler=decline_request,
            writes=True,
        ),
        Api(
            name="cancel_request",
            doc="Take an open request of yours back.",
            params=(REQUEST_ID,),
            handler=cancel_request,
            writes=True,
        ),
        Api(
            name="remind_request",
            doc="Recall an open request of yours.",
            params=(REQUEST_ID,),
            handler=remind_request,
            writes=True,
        ),
        Api(
            name="top_up",
            doc="Move coins from a card into your wallet.",
            params=(CARD_ID, AMOUNT),
            handler=top_up,
            writes=True,
        ),
        Api(
            name="withdraw",
            doc="Move coins from your wallet onto a card.",
            params=(CARD_ID, AMOUNT),
            handler=withdraw,
            writes=True,
        ),
        Api(
            name="save_into_pot",
            doc="Move coins from your wallet into a pot.",
            params=(POT_ID, AMOUNT),
            handler=save_into_pot,
            writes=True,
        ),
        Api(
            name="take_from_pot",
            doc="Move coins from a pot into your wallet.",
            params=(POT_ID, AMOUNT),
            handler=take_from_pot,
            writes=True,
        ),
    ),
)
