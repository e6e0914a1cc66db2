"""Paying, charging, answering requests."""

from typing import cast

from loopwright.envs.actions import Call
from loopwright.envs.officeworld.grading import Goal
from loopwright.envs.officeworld.scenario import Plan, Scenario, call
from loopwright.envs.officeworld.small.draw import DONE, Draw, look_up, write
from loopwright.envs.officeworld.state import Row


def _paid(draw: Draw, to: int, amount: int) -> Goal:
    transfer: tuple[str, Row] = ("transfers", {"to": to, "amount": amount})
    return Goal(added=(transfer,), changed=(("account", 1, {"balance": draw.balance - amount}),))


def _pay_person(draw: Draw) -> Plan:
    person, name = draw.person()
    amount = draw.rng.randrange(1, 30)
    calls = (
        call("contacts.find", name=name),
        *write("payments.send", to=person, amount=amount),
        DONE,
    )
    return Plan(
        values={"name": name, "amount": amount}, goal=_paid(draw, person, amount), calls=calls
    )


def _pay_and_text(draw: Draw) -> Plan:
    person, name = draw.person()
    amount, word = draw.rng.randrange(1, 30), draw.rng.choice(("thanks", "hello", "ready"))
    paid = _paid(draw, person, amount)
    goal = Goal(added=(*paid.added, ("sent", {"to": person, "text": word})), changed=paid.changed)
    calls = (
        call("contacts.find", name=name),
        *write("payments.send", to=person, amount=amount),
        *write("messages.send", to=person, text=word),
        DONE,
    )
    return Plan(values={"name": name, "amount": amount, "word": word}, goal=goal, calls=calls)


def _pay_or_text(draw: Draw) -> Plan:
    person, name = draw.person()
    enough = draw.rng.random() < 0.5
    amount = (
        draw.rng.randrange(1, draw.balance) if enough else draw.rng.randrange(draw.balance + 1, 99)
    )
    values = {"name": name, "amount": amount}
    start = (call("payments.balance"), call("contacts.find", name=name))
    if enough:
        calls = (*start, *write("payments.send", to=person, amount=amount), DONE)
        return Plan(values=values, goal=_paid(draw, person, amount), calls=calls)
    goal = Goal(added=(("sent", {"to": person, "text": "no"}),))
    return Plan(
        values=values,
        goal=goal,
        calls=(*start, *write("messages.send", to=person, text="no"), DONE),
    )


def _answer_request(draw: Draw) -> Plan:
    request, row = draw.pick("requests")
    person, amount = cast(int, row["person"]), cast(int, row["amount"])
    contact = draw.world.get("contacts", person)
    name = contact["name"] if contact is not None else ""
    start = call("payments.requests")
    if draw.rng.random() < 0.5:
        goal = Goal(changed=(("requests", request, {"state": "declined"}),))
        calls = (start, *write("payments.decline", id=request), DONE)
        return Plan(values={"verb": "decline", "name": name}, goal=goal, calls=calls)
    paid = _paid(draw, person, amount)
    goal = Goal(added=paid.added, changed=(*paid.changed, ("requests", request, {"state": "paid"})))
    calls = (start, *write("payments.accept", id=request), DONE)
    return Plan(values={"verb": "accept", "name": name}, goal=goal, calls=calls)


def _pay_asked(draw: Draw) -> Plan:
    inbox = list(draw.world.rows("inbox"))
    asking = [i for i, (_, row) in enumerate(inbox) if str(row["text"]).startswith("owe ")]
    index = draw.rng.choice(asking)
    row = inbox[index][1]
    person, amount = cast(int, row["sender"]), int(str(row["text"]).split()[1])
    contact = draw.world.get("contacts", person)
    name = contact["name"] if contact is not None else ""
    pages = [call("messages.list", page=page + 1) for page in range(index // draw.page_size + 1)]
    calls = (
        *pages,
        call("contacts.find", name=name),
        *write("payments.send", to=person, amount=amount),
        DONE,
    )
    return Plan(values={"name": name}, goal=_paid(draw, person, amount), calls=calls)


def _charge_guests(draw: Draw) -> Plan:
    event, row = draw.pick("events")
    amount = draw.rng.randrange(1, 30)
    guests = cast(tuple[int, ...], row["guests"])
    goal = Goal(added=tuple(("charges", {"to": guest, "amount": amount}) for guest in guests))
    charges: list[Call] = [call("payments.charge", to=guest, amount=amount) for guest in guests]
    calls = (
        call("calendar.list", day=row["day"]),
        call("calendar.guests", id=event),
        look_up("payments.charge"),
        *charges,
        DONE,
    )
    return Plan(
        values={"title": row["title"], "day": row["day"], "amount": amount}, goal=goal, calls=calls
    )


SCENARIOS = (
    Scenario(
        name="pay_person",
        difficulty=1,
        texts=(
            "pay {name} {amount}",
            "please pay {amount} to {name}",
            "please pay {name} {amount}",
        ),
        build=_pay_person,
    ),
    Scenario(
        name="answer_request",
        difficulty=1,
        texts=(
            "{verb} request of {name}",
            "please {verb} what {name} request",
            "please {verb} request of {name}",
        ),
        build=_answer_request,
    ),
    Scenario(
        name="pay_or_text",
        difficulty=2,
        texts=(
            "pay {name} {amount} or text no",
            "please pay {amount} to {name} or text no",
            "please pay {name} {amount} or text no",
        ),
        build=_pay_or_text,
    ),
    Scenario(
        name="pay_and_text",
        difficulty=3,
        texts=(
            "pay {name} {amount} and text {word}",
            "please pay {amount} to {name} and text {word}",
            "please pay {name} {amount} and text {word}",
        ),
        build=_pay_and_text,
    ),
    Scenario(
        name="pay_asked",
        difficulty=3,
        texts=(
            "pay {name} what message says",
            "please pay what message of {name} says",
            "please pay {name} what message says",
        ),
        build=_pay_asked,
    ),
    Scenario(
        name="charge_guests",
        difficulty=3,
        texts=(
            "charge guests of {title} {day} {amount}",
            "please charge {amount} to guests of {title} {day}",
            "please charge guests of {title} {day} {amount}",
        ),
        build=_charge_guests,
    ),
)
