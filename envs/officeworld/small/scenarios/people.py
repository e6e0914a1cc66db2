"""Contacts and messages."""

from typing import cast

from loopwright.envs.officeworld.grading import Goal
from loopwright.envs.officeworld.scenario import Plan, Scenario, call
from loopwright.envs.officeworld.small.draw import DONE, Draw, write
from loopwright.envs.officeworld.small.population import WORDS


def _text_id(draw: Draw) -> Plan:
    person, _ = draw.person()
    word = draw.rng.choice(WORDS)
    return Plan(
        values={"person": person, "word": word},
        goal=Goal(added=(("sent", {"to": person, "text": word}),)),
        calls=(*write("messages.send", to=person, text=word), DONE),
    )


def _text_person(draw: Draw) -> Plan:
    person, name = draw.person()
    word = draw.rng.choice(WORDS)
    return Plan(
        values={"name": name, "word": word},
        goal=Goal(added=(("sent", {"to": person, "text": word}),)),
        calls=(
            call("contacts.find", name=name),
            *write("messages.send", to=person, text=word),
            DONE,
        ),
    )


def _ask_phone(draw: Draw) -> Plan:
    person, row = draw.pick("contacts")
    phone = cast(int, row["phone"])
    calls = (
        call("contacts.find", name=row["name"]),
        call("contacts.show", id=person),
        call("done", answer=phone),
    )
    return Plan(values={"name": row["name"]}, goal=Goal(answer=phone), calls=calls)


def _set_phone(draw: Draw) -> Plan:
    person, row = draw.pick("contacts")
    phone = draw.rng.choice([n for n in range(10, 100) if n != row["phone"]])
    if draw.rng.random() < 0.5:
        name = str(row["name"])
        goal = Goal(changed=(("contacts", person, {"phone": phone}),))
        steps = write("contacts.update", id=person, phone=phone)
    else:
        name = draw.stranger()
        goal = Goal(added=(("contacts", {"name": name, "phone": phone}),))
        steps = write("contacts.add", name=name, phone=phone)
    calls = (call("contacts.find", name=name), *steps, DONE)
    return Plan(values={"name": name, "phone": phone}, goal=goal, calls=calls)


def _delete_message(draw: Draw) -> Plan:
    inbox = list(draw.world.rows("inbox"))
    index = draw.rng.randrange(len(inbox))
    message, row = inbox[index]
    sender = draw.world.get("contacts", cast(int, row["sender"]))
    pages = [call("messages.list", page=page + 1) for page in range(index // draw.page_size + 1)]
    return Plan(
        values={"name": sender["name"] if sender is not None else ""},
        goal=Goal(removed=(("inbox", message),)),
        calls=(*pages, *write("messages.delete", id=message), DONE),
    )


SCENARIOS = (
    Scenario(
        name="text_id",
        difficulty=1,
        texts=(
            "text {person} {word}",
            "please text {word} to {person}",
            "please text {person} {word}",
        ),
        build=_text_id,
    ),
    Scenario(
        name="text_person",
        difficulty=1,
        texts=(
            "text {name} {word}",
            "please text {word} to {name}",
            "please text {name} {word}",
        ),
        build=_text_person,
    ),
    Scenario(
        name="ask_phone",
        difficulty=1,
        texts=("phone of {name} ?", "please what phone of {name} ?", "please phone of {name} ?"),
        build=_ask_phone,
    ),
    Scenario(
        name="set_phone",
        difficulty=2,
        texts=(
            "set phone of {name} to {phone}",
            "please set {phone} phone of {name}",
            "please set phone of {name} to {phone}",
        ),
        build=_set_phone,
    ),
    Scenario(
        name="delete_message",
        difficulty=2,
        texts=(
            "delete message of {name}",
            "please delete what {name} message",
            "please delete message of {name}",
        ),
        build=_delete_message,
    ),
)
