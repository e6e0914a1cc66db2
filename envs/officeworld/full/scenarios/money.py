"""Payments, requests, cards, pots."""

from typing import Any

from loopwright.envs.officeworld.full.draw import Draw, call, plan
from loopwright.envs.officeworld.full.families import by_email, one, sets, total
from loopwright.envs.officeworld.scenario import Plan, Scenario

NOTES = ("lunch", "cinema", "taxi home", "flowers", "theater tickets")


def _wallet(draw: Draw) -> int:
    row: Any = draw.world.get("wallet", 1)
    return int(row["balance"])


def _pay(draw: Draw) -> Plan:
    person, amount, note = draw.person(), draw.rng.randint(2, 90), draw.rng.choice(NOTES)
    given = {"email": person["email"], "amount": amount, "note": note}
    return plan(
        {"name": person["name"], "amount": amount, "note": note},
        [*draw.look_up(person), call("payments.send_money", **given)],
        added=[draw.row("transfers", **given)],
        changed=[("wallet", 1, {"balance": _wallet(draw) - amount})],
    )


def _pay_private(draw: Draw) -> Plan:
    person, amount, note = draw.relative(), draw.rng.randint(2, 90), draw.rng.choice(NOTES)
    given = {"email": person["email"], "amount": amount, "note": note, "private": True}
    return plan(
        {"relation": person["relation"], "amount": amount, "note": note},
        [*draw.look_up_relation(person), call("payments.send_money", **given)],
        added=[draw.row("transfers", **given)],
        changed=[("wallet", 1, {"balance": _wallet(draw) - amount})],
    )


def _ask(draw: Draw) -> Plan:
    person, amount, note = draw.person(), draw.rng.randint(2, 90), draw.rng.choice(NOTES)
    given = {"email": person["email"], "amount": amount, "note": note}
    return plan(
        {"name": person["name"], "amount": amount, "note": note},
        [*draw.look_up(person), call("payments.request_money", **given)],
        added=[draw.row("requests", **given)],
    )


def _answer(draw: Draw) -> Plan:
    request_id, row = draw.pick(
        "requests", lambda r: r["direction"] == "in" and r["state"] == "open"
    )
    person = draw.by("email", row["email"])
    find = [
        *draw.look_up(person),
        *draw.listing("requests", [request_id], direction="in", email=row["email"], state="open"),
    ]
    if draw.rng.random() < 0.5:
        return plan(
            {"verb": "decline", "name": person["name"], "note": row["note"]},
            [*find, call("payments.decline_request", request_id=request_id)],
            changed=[("requests", request_id, {"state": "declined"})],
        )
    paid = draw.row("transfers", email=row["email"], amount=row["amount"], note=row["note"])
    return plan(
        {"verb": "accept", "name": person["name"], "note": row["note"]},
        [*find, call("payments.accept_request", request_id=request_id)],
        added=[paid],
        changed=[
            ("requests", request_id, {"state": "paid"}),
            ("wallet", 1, {"balance": _wallet(draw) - row["amount"]}),
        ],
    )


def _settle(draw: Draw) -> Plan:
    rows = draw.rows("requests", lambda r: r["direction"] == "in" and r["state"] == "open")
    amounts = sorted(row["amount"] for _, row in rows)
    limit = amounts[min(len(amounts) - 1, draw.rng.randint(1, 4))]
    small = [(i, row) for i, row in rows if row["amount"] <= limit]
    added = [
        draw.row("transfers", email=row["email"], amount=row["amount"], note=row["note"])
        for _, row in small
    ]
    spent = sum(row["amount"] for _, row in small)
    return plan(
        {"limit": limit},
        [
            *draw.listing("requests", direction="in", state="open"),
            *(call("payments.accept_request", request_id=i) for i, _ in small),
        ],
        added=added,
        changed=[
            *(("requests", i, {"state": "paid"}) for i, _ in small),
            ("wallet", 1, {"balance": _wallet(draw) - spent}),
        ],
    )


def _split(draw: Draw) -> Plan:
    event_id, event = draw.pick("events", lambda e: 2 <= len(e["guests"]) <= 4)
    share = draw.rng.randint(4, 30)
    cost = share * (len(event["guests"]) + 1)
    given = [{"email": g, "amount": share, "note": event["title"]} for g in event["guests"]]
    return plan(
        {"title": event["title"], "date": event["date"], "cost": cost},
        [
            *draw.listing("events", [event_id], date=event["date"]),
            call("calendar.show_event", event_id=event_id),
            *(call("payments.request_money", **g) for g in given),
        ],
        added=[draw.row("requests", **g) for g in given],
    )


def _remind(draw: Draw) -> Plan:
    rows = draw.rows("requests", lambda r: r["direction"] == "out" and r["state"] == "open")
    limit = sorted(row["date"] for _, row in rows)[min(len(rows) - 1, draw.rng.randint(1, 4))]
    old = [(i, row) for i, row in rows if row["date"] <= limit]
    return plan(
        {"limit": limit},
        [
            *draw.listing("requests", direction="out", state="open", before=limit),
            *(call("payments.remind_request", request_id=i) for i, _ in old),
        ],
        changed=[("requests", i, {"reminders": row["reminders"] + 1}) for i, row in old],
    )


def _top_up(draw: Draw) -> Plan:
    card_id, card = draw.pick("cards")
    amount = draw.rng.randint(10, 200)
    return plan(
        {"card": card["name"], "amount": amount},
        [*draw.listing("cards"), call("payments.top_up", card_id=card_id, amount=amount)],
        changed=[
            ("cards", card_id, {"money": card["money"] - amount}),
            ("wallet", 1, {"balance": _wallet(draw) + amount}),
        ],
    )


def _freeze(draw: Draw) -> Plan:
    card_id, card = draw.pick("cards")
    return plan(
        {"card": card["name"]},
        [*draw.listing("cards"), call("payments.freeze_card", card_id=card_id)],
        changed=[("cards", card_id, {"frozen": True})],
    )


def _save(draw: Draw) -> Plan:
    pot_id, pot = draw.pick("pots")
    amount = draw.rng.randint(5, 120)
    return plan(
        {"pot": pot["name"], "amount": amount},
        [
            *draw.search("pots", pot["name"], pot_id),
            call("payments.save_into_pot", pot_id=pot_id, amount=amount),
        ],
        changed=[
            ("pots", pot_id, {"saved": pot["saved"] + amount}),
            ("wallet", 1, {"balance": _wallet(draw) - amount}),
        ],
    )


def _close_pot(draw: Draw) -> Plan:
    pot_id, pot = draw.pick("pots")
    return plan(
        {"pot": pot["name"]},
        [
            *draw.search("pots", pot["name"], pot_id),
            call("payments.take_from_pot", pot_id=pot_id, amount=pot["saved"]),
            call("payments.delete_pot", pot_id=pot_id),
        ],
        changed=[("wallet", 1, {"balance": _wallet(draw) + pot["saved"]})],
        removed=[("pots", pot_id)],
    )


def _give_back(draw: Draw) -> Plan:
    email, rows = draw.pick_many("transfers", "email", 1, 3, lambda r: r["direction"] == "in")
    largest = max(row["amount"] for _, row in rows)
    person = draw.by("email", email)
    given = {"email": email, "amount": largest, "note": "refund"}
    return plan(
        {"name": person["name"]},
        [
            *draw.look_up(person),
            *draw.listing("transfers", direction="in", email=email),
            call("payments.send_money", **given),
        ],
        added=[draw.row("transfers", **given)],
        changed=[("wallet", 1, {"balance": _wallet(draw) - largest})],
    )


SCENARIOS = (
    Scenario(name="pay_person", difficulty=1, build=_pay, texts=(
        'Pay {name} {amount} coins with the note "{note}".',
        'Send {amount} coins from your wallet to {name}; the note is "{note}".',
        'You owe {name} {amount} coins for "{note}" (that is the note). Pay.',
    )),
    Scenario(name="pay_private", difficulty=2, build=_pay_private, texts=(
        'Send your {relation} {amount} coins privately, note "{note}".',
        'Pay {amount} coins to your {relation}. Note: "{note}". Nobody else should see the '
        'payment.',
        'A private payment to your {relation}: {amount} coins, with the note "{note}".',
    )),
    Scenario(name="request_money", difficulty=1, build=_ask, texts=(
        'Ask {name} for {amount} coins, note "{note}".',
        '{name} owes you {amount} coins for "{note}" (use that as the note): send a payment '
        'request.',
        'Request {amount} coins from {name} in the payments app with the note "{note}".',
    )),
    Scenario(name="answer_request", difficulty=2, build=_answer, texts=(
        'There is an open payment request of {name} for "{note}": {verb} it.',
        'Please {verb} what {name} asks for in the payments app ("{note}").',
        '{name} wants money from you for "{note}". You decided to {verb} the request.',
    )),
    Scenario(name="settle_small_requests", difficulty=3, build=_settle, texts=(
        "Accept every open payment request to you of at most {limit} coins; leave the others.",
        "Pay what others ask of you, where an open request is {limit} coins or less.",
        "Open requests up to {limit} coins are to be paid, larger ones stay open.",
    )),
    Scenario(name="split_cost", difficulty=3, build=_split, texts=(
        'The event "{title}" on {date} cost {cost} coins. Split it equally between you and its '
        'guests: request from each guest their share, note "{title}".',
        'You paid {cost} coins for "{title}" on {date}. Ask every guest for an equal share (you '
        'carry one too) with the note "{title}".',
        'Share the {cost} coins of "{title}" ({date}) among all who were there, yourself '
        'included: one request per guest, the note is "{title}".',
    )),
    Scenario(name="remind_debtors", difficulty=2, build=_remind, texts=(
        "Remind everybody of your own payment requests that are open since {limit} or longer.",
        "Requests of yours from {limit} or before that are still open: send a reminder for each.",
        "Recall each open request that you made up to and including {limit}.",
    )),
    Scenario(name="top_up_wallet", difficulty=1, build=_top_up, texts=(
        'Top up your wallet with {amount} coins from the card "{card}".',
        'Move {amount} coins from the "{card}" card into the wallet.',
        'Your wallet needs {amount} coins more; take them from your card "{card}".',
    )),
    Scenario(name="save_in_pot", difficulty=1, build=_save, held_out=True, texts=(
        'Put {amount} coins from your wallet into the saving pot "{pot}".',
        'Save {amount} coins for "{pot}".',
        'The pot "{pot}" gets {amount} more coins out of your wallet.',
    )),
    Scenario(name="close_pot", difficulty=2, build=_close_pot, held_out=True, texts=(
        'Take everything out of the saving pot "{pot}", then delete the pot.',
        'Give up saving for "{pot}": its coins go back to the wallet and the pot away.',
        'Dissolve the pot "{pot}": empty it into your wallet and remove it.',
    )),
    Scenario(name="refund_largest", difficulty=3, build=_give_back, held_out=True, texts=(
        'Pay the largest amount that {name} ever sent you back to them, with the note "refund".',
        'Of the transfers you got from {name}, return the biggest one (note "refund").',
        '{name} wants their largest payment to you back. Send it, with "refund" as the note.',
    )),
    Scenario(name="freeze_card", difficulty=1, build=_freeze, texts=(
        'Freeze the card "{card}".',
        'The bank card "{card}" is lost: freeze it.',
        'Nobody may pay with your card "{card}" for now: lock it.',
    )),
    total("sum_sent", "transfers", (
        "How many coins have you sent to {name} in all?",
        "Add up your payments to {name} and answer with the sum.",
        "What do all your transfers to {name} come to?",
    ), key="email", filters={"direction": "out"}, value_of=lambda r: int(r["amount"]),
        describe=by_email),
    one("pause_standing_order", "pause_standing_order", "standing_orders", sets(state="paused"), (
        'Pause the standing order for "{note}".',
        'The monthly payment for "{note}" should stop for a while: pause it.',
        'Put your standing order with the note "{note}" on hold.',
    ), by="note"),
)  # fmt: skip
