"""Travel: hotels, trains, bookings, trips. Held out of training."""

from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, Office, Param
from loopwright.envs.officeworld.columns import (
    Move,
    choice,
    clock,
    day,
    flag,
    many,
    number,
    ref,
    text,
)
from loopwright.envs.officeworld.full.declare import OfficeApp, Seeding
from loopwright.envs.officeworld.full.people import CITIES
from loopwright.envs.officeworld.resources import Resource
from loopwright.envs.officeworld.state import Value

TRIP = Resource(
    name="trip",
    plural="trips",
    table="trips",
    doc="a trip of yours",
    fields=(
        text("title", "its title"),
        choice("city", "where to", CITIES),
        day("date", "first day"),
        number("nights", "how many", low=0, high=60),
        many("companions", "email addresses of who comes along", "email", listed=False),
        choice(
            "state",
            "whether it takes place",
            ("planned", "done", "cancelled"),
            default="planned",
            given="never",
        ),
    ),
    dated="date",
    members={"companions": ("add_companion_to_trip", "remove_companion_from_trip", "email")},
    moves=(Move(verb="cancel", field="state", to="cancelled", source=("planned",)),),
)
HOTEL = Resource(
    name="hotel",
    plural="hotels",
    table="hotels",
    doc="a hotel",
    verbs=("list", "search", "show", "count"),
    fields=(
        text("name", "its name"),
        choice("city", "where", CITIES),
        number("price", "coins a night"),
        number("stars", "1 to 5"),
        flag("breakfast", "whether breakfast is included"),
        flag("saved", "whether you noted it", listed=False),
    ),
    flags={"saved": ("save", "unsave")},
)
STAY = Resource(
    name="stay",
    plural="stays",
    table="stays",
    doc="a hotel booking",
    verbs=("list", "show", "count"),
    fields=(
        ref("hotel_id", "hotels", "id of the hotel"),
        day("date", "first night"),
        number("nights", "how many"),
        number("guests", "how many people", default=1),
        number("total", "coins"),
        choice("state", "whether it holds", ("booked", "cancelled"), default="booked"),
    ),
    dated="date",
)
TRAIN = Resource(
    name="train",
    plural="trains",
    table="trains",
    doc="a train",
    verbs=("list", "search", "show", "count"),
    fields=(
        choice("origin", "from where", CITIES),
        choice("city", "to where", CITIES),
        day("date", "on which day", filters=True),
        clock("departs", "when it leaves"),
        number("minutes", "how long it takes"),
        number("price", "coins a seat"),
        number("seats", "seats left"),
    ),
    dated="date",
    search=("origin", "city"),
)
TICKET = Resource(
    name="ticket",
    plural="tickets",
    table="tickets",
    doc="a train ticket",
    verbs=("list", "show", "count"),
    fields=(
        ref("train_id", "trains", "id of the train"),
        number("seats", "how many seats"),
        choice("place", "where you sit", ("window", "aisle", "any"), default="any"),
        number("total", "coins"),
        choice("state", "whether it holds", ("booked", "cancelled"), default="booked"),
    ),
)


def book_stay(office: Office, hotel_id: int, date: str, nights: int, guests: int) -> Any:
    """Book a hotel."""
    hotel: Any = HOTEL.row(office, hotel_id)
    if date < str(office.profile["today"]):
        raise ApiError("invalid_value", "this day has passed", name="date")
    given: dict[str, Value] = {
        "hotel_id": hotel_id,
        "date": date,
        "nights": nights,
        "guests": guests,
    }
    return {"id": STAY.add(office, {**given, "total": hotel["price"] * nights})}


def book_ticket(office: Office, train_id: int, seats: int, place: str) -> Any:
    """Book a train."""
    train: Any = TRAIN.row(office, train_id)
    if train["seats"] < seats:
        raise ApiError("conflict", f"only {train['seats']} seats left")
    office.world.update("trains", train_id, seats=train["seats"] - seats)
    given: dict[str, Value] = {"train_id": train_id, "seats": seats, "place": place}
    return {"id": TICKET.add(office, {**given, "total": train["price"] * seats})}


def cancel_stay(office: Office, stay_id: int) -> None:
    """Cancel a hotel booking."""
    if STAY.row(office, stay_id)["state"] != "booked":
        raise ApiError("conflict", "it is cancelled already")
    office.world.update("stays", stay_id, state="cancelled")


def cancel_ticket(office: Office, ticket_id: int) -> None:
    """Cancel a ticket; its seats are free again."""
    row: Any = TICKET.row(office, ticket_id)
    if row["state"] != "booked":
        raise ApiError("conflict", "it is cancelled already")
    office.world.update("tickets", ticket_id, state="cancelled")
    train: Any = TRAIN.row(office, row["train_id"])
    office.world.update("trains", row["train_id"], seats=train["seats"] + row["seats"])


NAMES = (
    "Anchor",
    "Linden",
    "Old Mill",
    "Grand Pier",
    "Blue Door",
    "Station",
    "Heron",
    "Cloister",
    "Garden",
    "Sundial",
)


def seed(s: Seeding) -> None:
    """Forty hotels, a hundred trains, trips, bookings."""
    names = [f"{name} {kind}" for name in NAMES for kind in ("Hotel", "Inn", "House", "Rooms")]
    prices = s.rng.sample(range(40, 260), len(names))
    hotels = s.fill(
        "hotels",
        (
            {
                "name": name,
                "city": s.rng.choice(CITIES),
                "price": price,
                "stars": s.rng.randint(1, 5),
                "breakfast": s.rng.random() < 0.5,
            }
            for name, price in zip(names, prices, strict=True)
        ),
    )
    fares = s.rng.sample(range(9, 240), 100)
    trains = s.fill(
        "trains",
        (
            {
                "origin": a,
                "city": b,
                "date": s.day(1, 30),
                "departs": s.time(5, 22),
                "price": fare,
                "minutes": s.rng.randint(40, 400),
                "seats": s.rng.randint(3, 80),
            }
            for fare, (a, b) in zip(
                fares, (s.rng.sample(CITIES, 2) for _ in range(100)), strict=True
            )
        ),
    )
    s.fill(
        "trips",
        (
            {
                "title": f"{kind} in {city}",
                "city": city,
                "date": s.day(2, 90),
                "nights": s.rng.randint(1, 9),
                "companions": tuple(
                    str(p["email"]) for p in s.rng.sample(s.people, s.rng.randint(0, 3))
                ),
            }
            for kind, city in zip(
                ("Weekend", "Conference", "Visit", "Holiday", "Hike"),
                s.rng.sample(CITIES, 5),
                strict=True,
            )
        ),
    )
    s.fill(
        "stays",
        (
            {
                "hotel_id": h,
                "date": s.day(2, 90),
                "nights": s.rng.randint(1, 5),
                "total": s.rng.randint(60, 900),
            }
            for h in s.rng.sample(hotels, 6)
        ),
    )
    s.fill(
        "tickets",
        (
            {"train_id": t, "seats": s.rng.randint(1, 2), "total": s.rng.randint(20, 200)}
            for t in s.rng.sample(trains, 6)
        ),
    )


NIGHTS = Param(name="nights", kind="int", doc="how many", low=1, high=60)
GUESTS = Param(name="guests", kind="int", doc="how many people", default=1, low=1, high=6)
SEATS = Param(name="seats", kind="int", doc="how many seats", default=1, low=1, high=9)
PLACE = Param(
    name="place", kind="str", doc="where you sit", default="any", choices=("window", "aisle", "any")
)
APP = OfficeApp(
    name="travel",
    doc="Travel: trips, hotels and stays, trains and tickets.",
    held_out=True,
    resources=(TRIP, HOTEL, STAY, TRAIN, TICKET),
    seed=seed,
    apis=(
        Api(
            name="book_stay",
            doc="Book a hotel.",
            params=(
                HOTEL.id_param,
                Param(name="date", kind="day", doc="first night"),
                NIGHTS,
                GUESTS,
            ),
            handler=book_stay,
            writes=True,
            returns="id",
        ),
        Api(
            name="book_ticket",
            doc="Book seats of a train.",
            params=(TRAIN.id_param, SEATS, PLACE),
            handler=book_ticket,
            writes=True,
            returns="id",
        ),
        Api(
            name="cancel_stay",
            doc="Cancel a hotel booking.",
            params=(STAY.id_param,),
            handler=cancel_stay,
            writes=True,
        ),
        Api(
            name="cancel_ticket",
            doc="Cancel a ticket; its seats are free again.",
            params=(TICKET.id_param,),
            handler=cancel_ticket,
            writes=True,
        ),
    ),
)
