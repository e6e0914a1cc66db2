"""Events, invitations, reminders."""

from typing import Any

from loopwright.envs.officeworld.full.draw import Draw, call, plan
from loopwright.envs.officeworld.full.families import one, sets
from loopwright.envs.officeworld.scenario import Plan, Scenario

NEW = (
    "Roof repair",
    "Tasting",
    "Kick-off",
    "Birthday cake",
    "Paper sorting",
    "Phone with Ada's school",
)


def _hours(draw: Draw) -> tuple[str, str]:
    start = draw.rng.randint(8, 18)
    return f"{start:02d}:00", f"{start + 1:02d}:30"


def _plan_event(draw: Draw) -> Plan:
    title, date, (start, end) = draw.rng.choice(NEW), draw.day(1, 30), _hours(draw)
    given = {"title": title, "date": date, "start": start, "end": end}
    return plan(
        given, [call("calendar.create_event", **given)], added=[draw.row("events", **given)]
    )


def _meet(draw: Draw) -> Plan:
    title, date, (start, end) = draw.rng.choice(NEW), draw.day(1, 30), _hours(draw)
    person = draw.relative()
    given = {"title": title, "date": date, "start": start, "end": end, "guests": (person["email"],)}
    return plan(
        {**given, "relation": person["relation"]},
        [*draw.look_up_relation(person), call("calendar.create_event", **given)],
        added=[draw.row("events", **given)],
    )


def _coming(draw: Draw) -> tuple[int, Any]:
    return draw.pick("events", lambda e: e["date"] >= draw.today and e["state"] != "cancelled")


def _move(draw: Draw) -> Plan:
    event_id, event = _coming(draw)
    date, (start, end) = draw.day(41, 60), _hours(draw)
    new = {"date": date, "start": start, "end": end}
    return plan(
        {"title": event["title"], "old": event["date"], **new},
        [
            *draw.listing("events", [event_id], date=event["date"]),
            call("calendar.move_event", event_id=event_id, **new),
        ],
        changed=[("events", event_id, {k: v for k, v in new.items() if event[k] != v})],
    )


def _invite(draw: Draw) -> Plan:
    event_id, event = _coming(draw)
    person = draw.person(lambda p: p["email"] not in event["guests"])
    return plan(
        {"title": event["title"], "date": event["date"], "name": person["name"]},
        [
            *draw.listing("events", [event_id], date=event["date"]),
            *draw.look_up(person),
            call("calendar.invite_to_event", event_id=event_id, guest=person["email"]),
        ],
        changed=[("events", event_id, {"guests": (*event["guests"], person["email"])})],
    )


def _invite_group(draw: Draw) -> Plan:
    group_id, group = draw.pick("groups", lambda g: 2 <= len(g["members"]) <= 6)
    people: list[Any] = [draw.world.get("contacts", i) for i in group["members"]]
    emails = [p["email"] for p in people]
    event_id, event = draw.pick(
        "events", lambda e: e["date"] >= draw.today and not set(emails) & set(e["guests"])
    )
    return plan(
        {"title": event["title"], "date": event["date"], "group": group["name"]},
        [
            *draw.listing("events", [event_id], date=event["date"]),
            *draw.search("groups", group["name"], group_id),
            call("contacts.show_group", group_id=group_id),
            *(call("contacts.show_contact", contact_id=i) for i in group["members"]),
            *(call("calendar.invite_to_event", event_id=event_id, guest=e) for e in emails),
        ],
        changed=[("events", event_id, {"guests": (*event["guests"], *emails)})],
    )


def _accept(draw: Draw) -> Plan:
    invitation_id, row = draw.pick("invitations", lambda r: r["answer"] == "open")
    event = {k: row[k] for k in ("title", "date", "start", "end")}
    return plan(
        {"title": row["title"]},
        [
            *draw.search("invitations", row["title"], invitation_id),
            call("calendar.accept_invitation", invitation_id=invitation_id),
        ],
        added=[draw.row("events", **event, organizer=row["host"])],
        changed=[("invitations", invitation_id, {"answer": "accepted"})],
    )


def _call_off(draw: Draw) -> Plan:
    event_id, event = draw.pick(
        "events",
        lambda e: e["date"] >= draw.today and e["state"] != "cancelled" and len(e["guests"]) >= 2,
    )
    given = {
        "recipients": event["guests"],
        "subject": "Cancelled",
        "body": f"{event['title']} does not take place.",
    }
    return plan(
        {"title": event["title"], "date": event["date"], "body": given["body"]},
        [
            *draw.listing("events", [event_id], date=event["date"]),
            call("calendar.show_event", event_id=event_id),
            call("calendar.cancel_event", event_id=event_id),
            call("mail.send_email", **given),
        ],
        added=[draw.row("emails", **given)],
        changed=[("events", event_id, {"state": "cancelled"})],
    )


def _clear_day(draw: Draw) -> Plan:
    date, rows = draw.pick_many(
        "events", "date", 2, 3, lambda e: e["date"] >= draw.today and e["state"] != "cancelled"
    )
    return plan(
        {"date": date},
        [
            *draw.listing("events", date=date),
            *(call("calendar.cancel_event", event_id=i) for i, _ in rows),
        ],
        changed=[("events", i, {"state": "cancelled"}) for i, _ in rows],
    )


def _first_free(draw: Draw) -> Plan:
    date, _ = draw.pick_many("events", "date", 2, 3, lambda e: e["date"] > draw.today)
    events = draw.rows("events", lambda e: e["date"] == date and e["state"] != "cancelled")
    hours = [(f"{h:02d}:00", f"{h + 1:02d}:00") for h in range(8, 18)]
    start, end = next(
        (a, b) for a, b in hours if not any(e["start"] < b and e["end"] > a for _, e in events)
    )
    title = draw.rng.choice(NEW)
    given = {"title": title, "date": date, "start": start, "end": end}
    return plan(
        {"title": title, "date": date},
        [call("calendar.list_free_hours", date=date), call("calendar.create_event", **given)],
        added=[draw.row("events", **given)],
    )


def _count(draw: Draw) -> Plan:
    date, rows = draw.pick_many("events", "date", 2, 3)
    calls = draw.listing("events", date=date)
    return plan({"date": date}, calls, answer=len(rows))


def _remind(draw: Draw) -> Plan:
    event_id, event = _coming(draw)
    minutes = draw.rng.choice((15, 45, 120))
    given = {"event_id": event_id, "minutes": minutes, "channel": "email"}
    return plan(
        {"title": event["title"], "date": event["date"], "minutes": minutes},
        [
            *draw.listing("events", [event_id], date=event["date"]),
            call("calendar.create_reminder", **given),
        ],
        added=[draw.row("reminders", **given)],
    )


SCENARIOS = (
    Scenario(name="plan_event", difficulty=1, build=_plan_event, texts=(
        'Put "{title}" into the calendar: on {date}, from {start} to {end}.',
        'Add an event "{title}" on {date}; it begins at {start} and ends at {end}.',
        'On {date} from {start} until {end} there is "{title}". Note it in the calendar.',
    )),
    Scenario(name="meet_relative", difficulty=2, build=_meet, texts=(
        'Plan "{title}" with your {relation} as guest: {date}, {start} to {end}.',
        'Your {relation} comes to "{title}" on {date} from {start} to {end}. Create the event '
        'with them as the guest.',
        'New event "{title}" on {date} ({start} to {end}), inviting your {relation} only.',
    )),
    Scenario(name="move_event", difficulty=2, build=_move, texts=(
        'Move "{title}" from {old} to {date}, {start} to {end}.',
        '"{title}" of {old} is put off: it is now on {date} from {start} to {end}.',
        'The event "{title}" does not fit on {old}. Its new time is {date}, {start} until {end}.',
    )),
    Scenario(name="invite_person", difficulty=2, build=_invite, texts=(
        'Invite {name} to "{title}" on {date}.',
        '{name} should be a guest of "{title}", the event on {date}.',
        'Add {name} to the guests of the event "{title}" ({date}).',
    )),
    Scenario(name="invite_group", difficulty=3, build=_invite_group, texts=(
        'Invite everybody of your contact group "{group}" to "{title}" on {date}.',
        'The whole group "{group}" comes to "{title}" ({date}): add its members to the guests.',
        'All members of "{group}" should be guests of the event "{title}" on {date}.',
    )),
    Scenario(name="accept_invitation", difficulty=1, build=_accept, texts=(
        'Accept the invitation "{title}".',
        'Say yes to "{title}", to which you are invited.',
        'You will come to "{title}": accept it in the calendar app.',
    )),
    Scenario(name="call_off_event", difficulty=3, build=_call_off, texts=(
        'Cancel "{title}" on {date}, and send one email to all its guests: subject "Cancelled", '
        'text "{body}"',
        '"{title}" ({date}) is off. Cancel the event and tell its guests in a single email '
        'headed "Cancelled" that says "{body}"',
        'Call off the event "{title}" of {date}; its guests get one common email, subject '
        '"Cancelled": "{body}"',
    )),
    Scenario(name="clear_day", difficulty=2, build=_clear_day, texts=(
        "Cancel every event on {date}.",
        "You are ill on {date}: all events of that day are to be cancelled.",
        "Nothing takes place on {date}. Cancel (do not delete) its events.",
    )),
    Scenario(name="first_free_hour", difficulty=3, build=_first_free, held_out=True, texts=(
        'Plan "{title}" for the first free full hour on {date}, between 8:00 and 18:00.',
        'On {date}, in the earliest full hour from 8:00 on that is free, there should be an '
        'event "{title}".',
        'Find the first free hour (full hours from 8:00 to 18:00) on {date} and put "{title}" '
        'there.',
    )),
    Scenario(name="count_events", difficulty=1, build=_count, texts=(
        "How many events are in the calendar on {date}?",
        "Count the events of {date}.",
        "What is the number of events on {date}, whatever their state?",
    )),
    Scenario(name="remind_of_event", difficulty=2, build=_remind, held_out=True, texts=(
        'Have yourself reminded by email {minutes} minutes before "{title}" on {date}.',
        'Set an email reminder for "{title}" ({date}), {minutes} minutes ahead.',
        '{minutes} minutes before the event "{title}" of {date} an email should remind you.',
    )),
    one("decline_invitation", "decline_invitation", "invitations", sets(answer="declined"), (
        'Decline the invitation "{title}".',
        'You cannot come to "{title}": decline.',
        'Say no to the invitation "{title}".',
    ), by="title", keep=lambda r: r["answer"] == "open"),
)  # fmt: skip
