"""Short messages and rooms."""

from loopwright.envs.officeworld.full.draw import Draw, call, plan
from loopwright.envs.officeworld.full.families import by_phone, every, one, removes, sets
from loopwright.envs.officeworld.scenario import Plan, Scenario

LINES = (
    "See you at eight.",
    "The tickets are booked.",
    "Please call me back.",
    "Bring an umbrella!",
    "It is done.",
)


def _text(draw: Draw) -> Plan:
    person, text = draw.person(), draw.rng.choice(LINES)
    return plan(
        {"name": person["name"], "text": text},
        [*draw.look_up(person), call("messages.send_message", phone=person["phone"], text=text)],
        added=[draw.row("messages", phone=person["phone"], text=text)],
    )


def _text_group(draw: Draw) -> Plan:
    group_id, group = draw.pick("groups", lambda g: 2 <= len(g["members"]) <= 6)
    members = [draw.world.get("contacts", i) for i in group["members"]]
    text = draw.rng.choice(LINES)
    phones = [str(m["phone"]) for m in members if m is not None]
    return plan(
        {"group": group["name"], "text": text},
        [
            *draw.search("groups", group["name"], group_id),
            call("contacts.show_group", group_id=group_id),
            *(call("contacts.show_contact", contact_id=i) for i in group["members"]),
            *(call("messages.send_message", phone=p, text=text) for p in phones),
        ],
        added=[draw.row("messages", phone=p, text=text) for p in phones],
    )


def _post(draw: Draw) -> Plan:
    room_id, room = draw.pick("rooms")
    text = draw.rng.choice(LINES)
    return plan(
        {"room": room["name"], "text": text},
        [
            *draw.search("rooms", room["name"], room_id),
            call("messages.post_to_room", room_id=room_id, text=text),
        ],
        added=[draw.row("posts", room_id=room_id, text=text)],
    )


def _join(draw: Draw) -> Plan:
    room_id, room = draw.pick("rooms")
    person = draw.person(lambda p: p["phone"] not in room["members"])
    return plan(
        {"room": room["name"], "name": person["name"]},
        [
            *draw.search("rooms", room["name"], room_id),
            *draw.look_up(person),
            call("messages.add_member_to_room", room_id=room_id, phone=person["phone"]),
        ],
        changed=[("rooms", room_id, {"members": (*room["members"], person["phone"])})],
    )


def _ask_late(draw: Draw) -> Plan:
    event_id, event = draw.pick("events", lambda e: len(e["guests"]) >= 1)
    text = f"I am late for {event['title']}."
    guests = [draw.by("email", email) for email in event["guests"]]
    return plan(
        {"title": event["title"], "date": event["date"], "text": text},
        [
            *draw.listing("events", [event_id], date=event["date"]),
            call("calendar.show_event", event_id=event_id),
            *(call("contacts.show_contact_by_email", email=g["email"]) for g in guests),
            *(call("messages.send_message", phone=g["phone"], text=text) for g in guests),
        ],
        added=[draw.row("messages", phone=g["phone"], text=text) for g in guests],
    )


SCENARIOS = (
    Scenario(name="text_person", difficulty=1, build=_text, texts=(
        'Text {name}: "{text}"',
        'Send a short message to {name} that says "{text}"',
        '{name} should get the message "{text}" on their phone.',
    )),
    Scenario(name="text_group", difficulty=3, build=_text_group, texts=(
        'Text everybody in your contact group "{group}": "{text}"',
        'Each member of the group "{group}" should get the short message "{text}"',
        'Let all of "{group}" know, with a message of its own for each: "{text}"',
    )),
    Scenario(name="post_in_room", difficulty=1, build=_post, texts=(
        'Post "{text}" in the room "{room}".',
        'Write in the message room "{room}": "{text}"',
        'The people of the room "{room}" should read "{text}" from you.',
    )),
    Scenario(name="add_to_room", difficulty=2, build=_join, texts=(
        'Add {name} to the message room "{room}".',
        '{name} wants to join the room "{room}"; let them in.',
        'Make {name} a member of "{room}" in the messages app.',
    )),
    Scenario(name="late_for_event", difficulty=3, build=_ask_late, held_out=True, texts=(
        'Text each guest of the event "{title}" on {date}: "{text}"',
        'Send all guests of "{title}" ({date}) the short message "{text}"',
        'You run late. Each guest of "{title}" on {date} should get a message: "{text}"',
    )),
    one("mute_room", "mute_room", "rooms", sets(muted=True), (
        'Mute the room "{name}".',
        'The room "{name}" should make no sound any more.',
        'Silence the message room "{name}".',
    ), by="name", keep=lambda room: not room["muted"]),
    one("archive_room", "archive_room", "rooms", sets(archived=True), (
        'Archive the room "{name}".',
        'Nobody needs the message room "{name}" any more; put it into the archive.',
        'Put the room "{name}" away without deleting it.',
    ), by="name", held_out=True),
    every("delete_texts", "delete_message", "messages", removes(), (
        "Delete every message that you exchanged with {name}.",
        "Remove all short messages from and to {name}.",
        "Nothing should be left of your message history with {name}.",
    ), key="phone", describe=by_phone),
)  # fmt: skip
