"""The phone: calls, voicemails, alarms, timers, blocked numbers, settings."""

from typing import Any

from loopwright.envs.officeworld.api import Api, Office, Param
from loopwright.envs.officeworld.columns import TODAY, choice, clock, day, flag, many, number, text
from loopwright.envs.officeworld.full.declare import OfficeApp, Seeding
from loopwright.envs.officeworld.resources import Resource
from loopwright.envs.officeworld.state import Row

CALL = Resource(
    name="call",
    plural="calls",
    table="calls",
    doc="a phone call",
    verbs=("list", "search", "show", "delete", "count"),
    fields=(
        choice("direction", "who called", ("in", "out", "missed"), default="out"),
        text("phone", "number of the other person", refers="phone", filters=True),
        number("minutes", "how long it lasted", default=0),
        day("date", "when", default=TODAY),
    ),
    dated="date",
)
VOICEMAIL = Resource(
    name="voicemail",
    plural="voicemails",
    table="voicemails",
    doc="a message on your voicemail",
    verbs=("list", "search", "show", "delete", "count"),
    fields=(
        text("phone", "who left it", refers="phone", filters=True),
        text("text", "what was said", listed=False),
        number("seconds", "how long it is"),
        day("date", "when", default=TODAY),
        flag("heard", "whether you listened to it"),
    ),
    dated="date",
    flags={"heard": ("mark_heard", "mark_unheard")},
)
ALARM = Resource(
    name="alarm",
    plural="alarms",
    table="alarms",
    doc="an alarm",
    fields=(
        clock("time", "when it rings"),
        text("title", "what for"),
        many("days", "mon to sun; none for once"),
        flag("enabled", "whether it rings", default=True),
        number("snooze", "minutes between two rings", default=5, low=1, high=60, listed=False),
    ),
    flags={"enabled": ("enable", "disable")},
    members={"days": ("add_day_to_alarm", "remove_day_from_alarm", "weekday")},
)
TIMER = Resource(
    name="timer",
    plural="timers",
    table="timers",
    doc="a timer",
    fields=(
        text("title", "what for"),
        number("minutes", "how long", low=1, high=1440),
        flag("running", "whether it runs"),
    ),
    flags={"running": ("start", "stop")},
)
BLOCKED = Resource(
    name="blocked_number",
    plural="blocked_numbers",
    table="blocked",
    doc="a number that cannot reach you",
    verbs=("list", "create", "delete", "count"),
    fields=(text("phone", "the number", filters=True), text("reason", "why", default="")),
)


def call_number(office: Office, phone: str, minutes: int) -> Any:
    """Call somebody."""
    return {"id": CALL.add(office, {"phone": phone, "minutes": minutes})}


def show_settings(office: Office) -> Any:
    """Ringtone, volume, silence."""
    return dict(office.world.get("phone_settings", 1) or {})


def _set(name: str) -> Any:
    def handler(office: Office, **given: Any) -> None:
        office.world.update("phone_settings", 1, **{name: given[name]})

    return handler


def show_call_minutes(office: Office, phone: str) -> Any:
    """Minutes talked with one number."""
    minutes: Any = [row["minutes"] for _, row in office.world.rows("calls", phone=phone)]
    return {"calls": len(minutes), "minutes": sum(minutes)}


TITLES = (
    "Wake up",
    "Feed the cat",
    "Take pills",
    "Leave for the train",
    "Water plants",
    "Stretch",
    "Pick up kids",
    "Bake bread",
)


def seed(s: Seeding) -> None:
    """A hundred and twenty calls, voicemails, alarms of different titles, timers."""
    callers = s.rng.sample(s.people, 30)
    s.fill(
        "calls",
        sorted(
            (_call(s, str(s.rng.choice(callers)["phone"])) for _ in range(120)),
            key=lambda row: str(row["date"]),
        ),
    )
    s.fill(
        "voicemails",
        sorted(
            (
                {
                    "phone": p["phone"],
                    "text": s.rng.choice(("Please call back.", "It can wait.", "See you there!")),
                    "seconds": n,
                    "date": s.day(-30, 0),
                    "heard": s.rng.random() < 0.5,
                }
                for p, n in zip(
                    s.rng.sample(s.people, 24), s.rng.sample(range(5, 180), 24), strict=True
                )
            ),
            key=lambda row: str(row["date"]),
        ),
    )
    s.fill(
        "alarms",
        (
            {
                "time": s.time(5, 20),
                "title": title,
                "enabled": s.rng.random() < 0.6,
                "snooze": s.rng.choice((5, 10)),
                "days": s.rng.choice(((), ("mon", "tue", "wed", "thu", "fri"), ("sat", "sun"))),
            }
            for title in TITLES
        ),
    )
    s.fill(
        "timers", ({"title": t, "minutes": s.rng.randint(3, 90)} for t in ("Tea", "Laundry", "Nap"))
    )
    s.fill(
        "blocked",
        ({"phone": f"000-{s.rng.randint(1000, 9999)}", "reason": "advertising"} for _ in range(4)),
    )
    s.tables["phone_settings"] = {
        1: {"ringtone": "chime", "volume": s.rng.randint(1, 9) * 10, "silent": False}
    }


def _call(s: Seeding, phone: str) -> Row:
    direction = s.rng.choice(("in", "out", "missed"))
    minutes = 0 if direction == "missed" else s.rng.randint(1, 70)
    return {"direction": direction, "phone": phone, "minutes": minutes, "date": s.day(-60, 0)}


PHONE = Param(name="phone", kind="str", doc="a phone number")
MINUTES = Param(name="minutes", kind="int", doc="how long you talk", default=1, low=1, high=600)
APP = OfficeApp(
    name="phone",
    doc="The phone: calls, voicemails, alarms, timers, blocked numbers, settings.",
    resources=(CALL, VOICEMAIL, ALARM, TIMER, BLOCKED),
    tables=("phone_settings",),
    seed=seed,
    apis=(
        Api(
            name="call_number",
            doc="Call somebody you know.",
            params=(PHONE, MINUTES),
            handler=call_number,
            writes=True,
            returns="id",
        ),
        Api(
            name="show_call_minutes",
            doc="Calls and minutes with one number.",
            params=(PHONE,),
            handler=show_call_minutes,
            returns="calls, minutes",
        ),
        Api(
            name="show_settings",
            doc="Ringtone, volume, silence.",
            handler=show_settings,
            returns="ringtone, volume, silent",
        ),
        Api(
            name="set_ringtone",
            doc="Set the ringtone.",
            handler=_set("ringtone"),
            writes=True,
            params=(
                Param(
                    name="ringtone",
                    kind="str",
                    doc="which",
                    choices=("chime", "bell", "marimba", "birds"),
                ),
            ),
        ),
        Api(
            name="set_volume",
            doc="Set how loud it rings.",
            handler=_set("volume"),
            writes=True,
            params=(Param(name="volume", kind="int", doc="0 to 100", low=0, high=100),),
        ),
        Api(
            name="set_silent",
            doc="Ring or not.",
            handler=_set("silent"),
            writes=True,
            params=(Param(name="silent", kind="bool", doc="true for silence"),),
        ),
    ),
)
