"""Events of the week."""

from typing import cast

from loopwright.envs.officeworld.grading import Goal
from loopwright.envs.officeworld.scenario import Plan, Scenario, call
from loopwright.envs.officeworld.small.draw import DONE, Draw, look_up, write
from loopwright.envs.officeworld.small.population import DAYS, TITLES
from loopwright.envs.officeworld.state import Row


def _cancel_event(draw: Draw) -> Plan:
    event, row = draw.pick("events")
    return Plan(
        values={"title": row["title"], "day": row["day"]},
        goal=Goal(removed=(("events", event),)),
        calls=(call("calendar.list", day=row["day"]), *write("calendar.cancel", id=event), DONE),
    )


def _move_event(draw: Draw) -> Plan:
    event, row = draw.pick("events")
    target = draw.rng.choice([day for day in DAYS if day != row["day"]])
    return Plan(
        values={"title": row["title"], "day": row["day"], "target": target},
        goal=Goal(changed=(("events", event, {"day": target}),)),
        calls=(
            call("calendar.list", day=row["day"]),
            *write("calendar.move", id=event, day=target),
            DONE,
        ),
    )


def _invite_person(draw: Draw) -> Plan:
    event, row = draw.pick("events")
    guests = cast(tuple[int, ...], row["guests"])
    person, contact = draw.rng.choice(
        [(i, r) for i, r in draw.world.rows("contacts") if i not in guests]
    )
    return Plan(
        values={"name": contact["name"], "title": row["title"], "day": row["day"]},
        goal=Goal(changed=(("events", event, {"guests": (*guests, person)}),)),
        calls=(
            call("calendar.list", day=row["day"]),
            call("contacts.find", name=contact["name"]),
            *write("calendar.invite", id=event, guest=person),
            DONE,
        ),
    )


def _plan_event(draw: Draw) -> Plan:
    person, name = draw.person()
    day, hour = draw.rng.choice(DAYS), draw.rng.randrange(8, 18)
    taken = {row["title"] for _, row in draw.world.rows("events", day=day)}
    title = draw.rng.choice([t for t in TITLES if t not in taken])
    event = max(i for i, _ in draw.world.rows("events")) + 1
    row: Row = {"title": title, "day": day, "hour": hour, "guests": (person,)}
    return Plan(
        values={"name": name, "title": title, "day": day, "hour": hour},
        goal=Goal(added=(("events", row),)),
        calls=(
            *write("calendar.add", day=day, hour=hour, title=title),
            call("calendar.list", day=day),
            call("contacts.find", name=name),
            look_up("calendar.invite"),
            call("calendar.invite", id=event, guest=person),
            DONE,
        ),
    )


SCENARIOS = (
    Scenario(
        name="cancel_event",
        difficulty=1,
        texts=(
            "cancel {title} {day}",
            "please cancel {title} of {day}",
            "please cancel {title} {day}",
        ),
        build=_cancel_event,
    ),
    Scenario(
        name="move_event",
        difficulty=2,
        texts=(
            "move {title} {day} to {target}",
            "please move {title} of {day} to {target}",
            "please move {title} {day} to {target}",
        ),
        build=_move_event,
    ),
    Scenario(
        name="invite_person",
        difficulty=2,
        texts=(
            "invite {name} to {title} {day}",
            "please invite {name} to {title} of {day}",
            "please invite {name} to {title} {day}",
        ),
        build=_invite_person,
    ),
    Scenario(
        name="plan_event",
        difficulty=3,
        texts=(
            "plan {title} {day} at {hour} and invite {name}",
            "please plan {title} of {day} at {hour} and invite {name}",
            "please plan {title} {day} at {hour} and invite {name}",
        ),
        build=_plan_event,
    ),
)
