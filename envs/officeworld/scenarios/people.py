"""Contacts and messages."""

from typing import cast

from loopwright.envs.officeworld.grading import Goal
from loopwright.envs.officeworld.population import WORDS
from loopwright.envs.officeworld.scenario import DONE, Draw, Plan, Scenario, call, write


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
        compact=(
            "text {person} {word}",
            "please text {word} to {person}",
            "please text {person} {word}",
        ),
        full=(
            'Send the message "{word}" to the contact with id {person}.',
            'Contact {person} should receive a message that says "{word}".',
            'Write "{word}" to contact number {person}.',
        ),
        build=_text_id,
    ),
    Scenario(
        name="text_person",
        difficulty=1,
        compact=(
            "text {name} {word}",
            "please text {word} to {name}",
            "please text {name} {word}",
        ),
        full=(
            'Send {name} the message "{word}".',
            '{name} should receive a message that says "{word}".',
            'Write "{word}" to {name} with the messages app.',
        ),
        build=_text_person,
    ),
    Scenario(
        name="ask_phone",
        difficulty=1,
        compact=("phone of {name} ?", "please what phone of {name} ?", "please phone of {name} ?"),
        full=(
            "What is the phone extension of {name}? Finish with the number as the answer.",
            "Find out at which extension {name} can be called, and answer with it.",
            "Under which number do you have {name} in your contacts?",
        ),
        build=_ask_phone,
    ),
    Scenario(
        name="set_phone",
        difficulty=2,
        compact=(
            "set phone of {name} to {phone}",
            "please set {phone} phone of {name}",
            "please set phone of {name} to {phone}",
        ),
        full=(
            "{name} has phone extension {phone}. Update the contact, or add a missing one.",
            "Make sure that {name} is in your contacts, with extension {phone}.",
            "{name} can be called at {phone}; note that in contacts, in a new one if needed.",
        ),
        build=_set_phone,
    ),
    Scenario(
        name="delete_message",
        difficulty=2,
        compact=(
            "delete message of {name}",
            "please delete what {name} message",
            "please delete message of {name}",
        ),
        full=(
            "Delete the message that {name} sent you.",
            "You no longer need the message of {name}: remove it from the inbox.",
            "Clean up: the message you got from {name} can go, and nothing else.",
        ),
        build=_delete_message,
    ),
)
