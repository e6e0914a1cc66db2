"""Events with a day, an hour and guests."""

from typing import Any, cast

from loopwright.envs.officeworld.api import Api, ApiError, App, Office, Param, require
from loopwright.envs.officeworld.small.population import DAYS

ID = Param(name="id", kind="int", doc="id of the event")
DAY = Param(name="day", kind="str", doc="one of " + ", ".join(DAYS))


def _check_day(day: str) -> None:
    if day not in DAYS:
        raise ApiError("invalid_value", "the day must be one of " + ", ".join(DAYS), name="day")


def list_day(office: Office, day: str) -> Any:
    """Events of a day."""
    _check_day(day)
    return [
        {"id": i, "title": r["title"], "hour": r["hour"]}
        for i, r in office.world.rows("events", day=day)
    ]


def guests(office: Office, id: int) -> Any:
    """Contact ids of the guests of an event."""
    invited = cast(tuple[int, ...], require(office, "events", id)["guests"])
    return [{"guest": guest} for guest in invited]


def add(office: Office, day: str, hour: int, title: str) -> None:
    """A new event without guests."""
    _check_day(day)
    if not 0 <= hour <= 23:
        raise ApiError("invalid_value", "the hour must be 0 to 23", name="hour")
    office.world.insert("events", {"title": title, "day": day, "hour": hour, "guests": ()})


def move(office: Office, id: int, day: str) -> None:
    """Move an event to another day."""
    require(office, "events", id)
    _check_day(day)
    office.world.update("events", id, day=day)


def cancel(office: Office, id: int) -> None:
    """Delete an event."""
    require(office, "events", id)
    office.world.remove("events", id)


def invite(office: Office, id: int, guest: int) -> None:
    """Add a guest."""
    invited = cast(tuple[int, ...], require(office, "events", id)["guests"])
    require(office, "contacts", guest)
    if guest in invited:
        raise ApiError("conflict", "already invited")
    office.world.update("events", id, guests=(*invited, guest))


APP = App(
    name="calendar",
    doc="Your week: events and their guests.",
    apis=(
        Api(name="list", doc="Events of a day: id, title, hour.", params=(DAY,), handler=list_day),
        Api(
            name="guests",
            doc="Contact ids of the guests of an event.",
            params=(ID,),
            handler=guests,
        ),
        Api(
            name="add",
            doc="Add an event.",
            params=(
                DAY,
                Param(name="hour", kind="int", doc="0 to 23"),
                Param(name="title", kind="str", doc="what it is"),
            ),
            handler=add,
            writes=True,
        ),
        Api(
            name="move",
            doc="Move an event to another day.",
            params=(ID, DAY),
            handler=move,
            writes=True,
        ),
        Api(name="cancel", doc="Delete an event.", params=(ID,), handler=cancel, writes=True),
        Api(
            name="invite",
            doc="Invite a contact to an event.",
            params=(ID, Param(name="guest", kind="int", doc="contact id of the guest")),
            handler=invite,
            writes=True,
        ),
    ),
)
