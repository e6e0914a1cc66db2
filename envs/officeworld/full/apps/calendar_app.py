"""Calendars, events with guests, invitations, reminders."""

from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, Office, Param
from loopwright.envs.officeworld.columns import (
    ME,
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
from loopwright.envs.officeworld.resources import Resource
from loopwright.envs.officeworld.state import Row


def ordered(_office: Office, _event_id: int, row: Row) -> None:
    """An event ends after it begins."""
    if str(row["end"]) <= str(row["start"]):
        raise ApiError("invalid_value", "an event must end after it begins", name="end")


CALENDAR = Resource(
    name="calendar",
    plural="calendars",
    table="calendars",
    doc="a calendar",
    fields=(
        text("name", "its name"),
        choice("color", "its color", ("red", "green", "blue", "gray"), default="blue"),
        flag("hidden", "whether it is left out of views"),
    ),
    flags={"hidden": ("hide", "unhide")},
)
EVENT = Resource(
    name="event",
    plural="events",
    table="events",
    doc="an event",
    fields=(
        text("title", "what it is"),
        day("date", "on which day", filters=True),
        clock("start", "when it begins"),
        clock("end", "when it ends"),
        text("place", "where", default="", listed=False),
        ref("calendar_id", "calendars", "id of the calendar; 0 for none", default=0),
        text(
            "organizer", "email address of who planned it", default=ME, given="never", listed=False
        ),
        many("guests", "email addresses", "email", listed=False),
        choice(
            "state",
            "whether it takes place",
            ("planned", "confirmed", "cancelled"),
            default="planned",
            given="never",
        ),
    ),
    dated="date",
    members={"guests": ("invite_to_event", "uninvite_from_event", "guest")},
    moves=(
        Move(verb="confirm", field="state", to="confirmed", source=("planned",)),
        Move(verb="cancel", field="state", to="cancelled"),
    ),
    check=ordered,
)
REMINDER = Resource(
    name="reminder",
    plural="reminders",
    table="reminders",
    doc="a reminder of an event",
    fields=(
        ref("event_id", "events", "id of the event"),
        number("minutes", "how many before it begins", low=0, high=10080),
        choice("channel", "how", ("popup", "email"), default="popup"),
    ),
    search=("channel",),
)
INVITATION = Resource(
    name="invitation",
    plural="invitations",
    table="invitations",
    doc="an invitation by others",
    verbs=("list", "search", "show", "count"),
    fields=(
        text("title", "to what"),
        text("host", "email address of who invites", filters=True),
        day("date", "on which day", filters=True),
        clock("start", "when it begins"),
        clock("end", "when it ends"),
        choice("answer", "what you said", ("open", "accepted", "declined"), default="open"),
    ),
    dated="date",
)


def _answer(office: Office, invitation_id: int, answer: str) -> Row:
    row = INVITATION.row(office, invitation_id)
    if row["answer"] != "open":
        raise ApiError("conflict", f"you have {row['answer']} it already")
    office.world.update("invitations", invitation_id, answer=answer)
    return row


def accept_invitation(office: Office, invitation_id: int) -> Any:
    """Say yes: the event goes into the calendar."""
    row: Any = _answer(office, invitation_id, "accepted")
    event = {k: row[k] for k in ("title", "date", "start", "end")}
    whole = EVENT.full_row(office.profile, {**event, "organizer": row["host"]})
    return {"event_id": office.world.insert("events", whole)}


def decline_invitation(office: Office, invitation_id: int) -> None:
    """Say no."""
    _answer(office, invitation_id, "declined")


def list_free_hours(office: Office, date: str) -> Any:
    """Full hours from 8 to 18 without an event that takes place."""
    events = [r for _, r in office.world.rows("events", date=date) if r["state"] != "cancelled"]
    hours = [(f"{h:02d}:00", f"{h + 1:02d}:00") for h in range(8, 18)]
    return [
        {"start": start, "end": end}
        for start, end in hours
        if not any(str(r["start"]) < end and str(r["end"]) > start for r in events)
    ]


def move_event(office: Office, event_id: int, date: str, start: str, end: str) -> None:
    """Another day and time."""
    EVENT.put(office, event_id, {"date": date, "start": start, "end": end})


TITLES = (
    "Design review",
    "Dentist",
    "Budget round",
    "Yoga class",
    "Team breakfast",
    "Choir rehearsal",
    "Client call",
    "Planning poker",
    "Car service",
    "Book circle",
    "Parents evening",
    "Sprint demo",
    "Tax advisor",
    "Pottery course",
    "Board games",
    "Job interview",
    "Vet appointment",
    "Museum visit",
    "Safety training",
    "Farewell drinks",
)
PLACES = ("Room Aspen", "Room Birch", "Cafe Lumen", "Town hall", "Online", "")


def seed(s: Seeding) -> None:
    """Events over ten weeks, never two of one title on one day; invitations, reminders."""
    calendars = s.fill("calendars", [{"name": n} for n in ("Work", "Private", "Sports")])
    rows: list[Row] = []
    for offset in range(-30, 41):
        date = s.day(offset, offset)
        for title in s.rng.sample(TITLES, s.rng.choice((0, 1, 1, 2, 3))):
            hour = s.rng.randint(8, 17)
            rows.append(
                {
                    "title": title,
                    "date": date,
                    "start": f"{hour:02d}:{s.rng.choice((0, 30)):02d}",
                    "end": f"{hour + 1:02d}:30",
                    "place": s.rng.choice(PLACES),
                    "calendar_id": s.rng.choice(calendars),
                    "guests": tuple(
                        str(p["email"]) for p in s.rng.sample(s.people, s.rng.randint(0, 4))
                    ),
                    "state": s.rng.choice(("planned", "planned", "confirmed")),
                }
            )
    events = s.fill("events", rows)
    s.fill(
        "reminders",
        ({"event_id": e, "minutes": s.rng.choice((10, 30, 60))} for e in s.rng.sample(events, 12)),
    )
    s.fill(
        "invitations",
        (
            {
                "title": f"{title} with {p['name']}",
                "host": p["email"],
                "date": s.day(1, 30),
                "start": "19:00",
                "end": "21:00",
                "answer": s.rng.choice(("open", "open", "declined")),
            }
            for title, p in zip(s.rng.sample(TITLES, 10), s.rng.sample(s.people, 10), strict=True)
        ),
    )


DATE = Param(name="date", kind="day", doc="the day")
APP = OfficeApp(
    name="calendar",
    doc="Calendars, events with guests, invitations by others, reminders.",
    resources=(CALENDAR, EVENT, REMINDER, INVITATION),
    seed=seed,
    apis=(
        Api(
            name="accept_invitation",
            doc="Accept an invitation: its event goes into your calendar.",
            params=(INVITATION.id_param,),
            handler=accept_invitation,
            writes=True,
            returns="event_id",
        ),
        Api(
            name="decline_invitation",
            doc="Decline an invitation.",
            params=(INVITATION.id_param,),
            handler=decline_invitation,
            writes=True,
        ),
        Api(
            name="list_free_hours",
            doc="Full hours between 8:00 and 18:00 without an event.",
            params=(DATE,),
            handler=list_free_hours,
            paged=True,
        ),
        Api(
            name="move_event",
            doc="Move an event to another day and time.",
            handler=move_event,
            writes=True,
            params=(
                EVENT.id_param,
                DATE,
                Param(name="start", kind="clock", doc="when it begins"),
                Param(name="end", kind="clock", doc="when it ends"),
            ),
        ),
    ),
)
