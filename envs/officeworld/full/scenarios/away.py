"""Travel and expenses: the two apps that training never sees."""

from typing import Any

from loopwright.envs.officeworld.full.draw import Draw, call, plan
from loopwright.envs.officeworld.full.families import named, one, sets, total
from loopwright.envs.officeworld.scenario import Plan, Scenario


def _cheapest_hotel(draw: Draw) -> Plan:
    city, rows = draw.pick_many("hotels", "city", 1, 9, lambda h: h["breakfast"])
    hotel_id, hotel = min(rows, key=lambda pair: pair[1]["price"])
    date, nights = draw.day(5, 60), draw.rng.randint(1, 6)
    given = {"hotel_id": hotel_id, "date": date, "nights": nights}
    return plan(
        {"city": city, "date": date, "nights": nights},
        [
            *draw.listing("hotels", [hotel_id], city=city, breakfast=True, sort_by="price"),
            call("travel.book_stay", **given),
        ],
        added=[draw.row("stays", **given, total=hotel["price"] * nights)],
    )


def _cheapest_train(draw: Draw) -> Plan:
    city, rows = draw.pick_many("trains", "city", 3, 30)
    train_id, train = min(rows, key=lambda pair: pair[1]["price"])
    place = draw.rng.choice(("window", "aisle"))
    return plan(
        {"city": city, "place": place},
        [
            *draw.listing("trains", [train_id], city=city, sort_by="price"),
            call("travel.book_ticket", train_id=train_id, seats=1, place=place),
        ],
        added=[draw.row("tickets", train_id=train_id, seats=1, place=place, total=train["price"])],
        changed=[("trains", train_id, {"seats": train["seats"] - 1})],
    )


def _join_trip(draw: Draw) -> Plan:
    trip_id, trip = draw.pick("trips")
    person = draw.person(lambda p: p["email"] not in trip["companions"])
    return plan(
        {"trip": trip["title"], "name": person["name"]},
        [
            *draw.search("trips", trip["title"], trip_id),
            *draw.look_up(person),
            call("travel.add_companion_to_trip", trip_id=trip_id, email=person["email"]),
        ],
        changed=[("trips", trip_id, {"companions": (*trip["companions"], person["email"])})],
    )


def _cancel_trip(draw: Draw) -> Plan:
    trips = draw.rows("trips", lambda t: len(t["companions"]) >= 1) or draw.rows("trips")
    trip_id, trip = draw.rng.choice(trips)
    body = f"{trip['title']} is off, sorry."
    emails = [
        {"recipients": (email,), "subject": "Our trip", "body": body}
        for email in trip["companions"]
    ]
    return plan(
        {"trip": trip["title"], "body": body},
        [
            *draw.search("trips", trip["title"], trip_id),
            call("travel.show_trip", trip_id=trip_id),
            call("travel.cancel_trip", trip_id=trip_id),
            *(call("mail.send_email", **given) for given in emails),
        ],
        added=[draw.row("emails", **given) for given in emails],
        changed=[("trips", trip_id, {"state": "cancelled"})],
    )


def _file_receipts(draw: Draw) -> Plan:
    report_id, report = draw.pick("reports", lambda r: r["state"] == "draft")
    kind, rows = draw.pick_many(
        "receipts", "kind", 1, 4, lambda r: r["report_id"] == 0 and not r["personal"]
    )
    return plan(
        {"kind": kind, "report": report["title"]},
        [
            *draw.search("reports", report["title"], report_id),
            *draw.listing("receipts", kind=kind, report_id=0),
            *(call("expenses.file_receipt", receipt_id=i, report_id=report_id) for i, _ in rows),
        ],
        changed=[("receipts", i, {"report_id": report_id}) for i, _ in rows],
    )


def _new_receipt(draw: Draw) -> Plan:
    given = {
        "merchant": draw.rng.choice(("Tram office", "Noodle bar", "Map shop")),
        "amount": draw.rng.randint(401, 600),
        "kind": draw.rng.choice(("meals", "travel", "supplies")),
        "date": draw.day(-10, 0),
    }
    return plan(
        given, [call("expenses.create_receipt", **given)], added=[draw.row("receipts", **given)]
    )


def _travel_costs(draw: Draw) -> Plan:
    trip_id, trip = draw.pick("trips")
    amount = draw.rng.randint(401, 900)
    receipt = {"merchant": "Railhouse", "amount": amount, "kind": "travel", "date": trip["date"]}
    made = draw.world.next_id("reports")
    return plan(
        {"trip": trip["title"], "amount": amount},
        [
            *draw.search("trips", trip["title"], trip_id),
            call("expenses.create_report", title=trip["title"]),
            call("expenses.create_receipt", **receipt, report_id=made),
            call("expenses.submit_report", report_id=made),
        ],
        added=[
            _submitted(draw, trip["title"]),
            draw.row("receipts", **receipt, report_id=made),
        ],
    )


def _submitted(draw: Draw, title: str) -> tuple[str, Any]:
    table, row = draw.row("reports", title=title)
    return table, {**row, "state": "submitted"}


SCENARIOS = (
    Scenario(name="book_cheapest_hotel", difficulty=3, build=_cheapest_hotel, held_out=True, texts=(
        "Book the cheapest hotel with breakfast in {city} for yourself: {nights} nights from "
        "{date}.",
        "From {date} you stay {nights} nights in {city}. Book the hotel with breakfast that "
        "costs least.",
        "{nights} nights in {city}, first night {date}: choose the lowest price among hotels "
        "that include breakfast.",
    )),
    Scenario(name="book_cheapest_train", difficulty=2, build=_cheapest_train, held_out=True, texts=(
        "Book one {place} seat on the cheapest train to {city}, from anywhere on any day.",
        "The train to {city} with the lowest price is yours, wherever it starts: one seat, "
        "{place}.",
        "Get a ticket for the cheapest train that goes to {city}; sit at the {place}.",
    )),
    Scenario(name="join_trip", difficulty=2, build=_join_trip, held_out=True, texts=(
        'Add {name} as a companion to your trip "{trip}".',
        '{name} comes along on "{trip}": note that in the travel app.',
        'On the trip "{trip}" {name} is with you too.',
    )),
    Scenario(name="cancel_trip", difficulty=3, build=_cancel_trip, held_out=True, texts=(
        'Cancel the trip "{trip}", and email each companion separately: subject "Our trip", text '
        '"{body}"',
        '"{trip}" does not happen. Cancel it, and let every companion know with an email of '
        'their own, headed "Our trip": "{body}"',
        'Call the trip "{trip}" off. Its companions each get an email "Our trip" that says '
        '"{body}"',
    )),
    Scenario(name="file_receipts", difficulty=3, build=_file_receipts, held_out=True, texts=(
        'Put all {kind} receipts that are in no report and not personal into the report '
        '"{report}".',
        'File every business receipt of kind {kind} without a report in "{report}".',
        'The expense report "{report}" should take in the {kind} receipts that belong to no '
        'report yet, apart from personal ones.',
    )),
    Scenario(name="new_receipt", difficulty=1, build=_new_receipt, held_out=True, texts=(
        "Record a receipt: {merchant}, {amount} coins, kind {kind}, on {date}.",
        "On {date} you paid {amount} coins at {merchant} ({kind}). Enter the receipt.",
        "Add the {kind} receipt of {merchant} over {amount} coins, dated {date}, to your expenses.",
    )),
    Scenario(name="expense_trip", difficulty=3, build=_travel_costs, held_out=True, texts=(
        'Make an expense report named like the trip "{trip}", with one travel receipt of '
        'Railhouse over {amount} coins dated on the first day of the trip, and submit it.',
        'Your trip "{trip}" cost {amount} coins at Railhouse (a travel receipt, dated the day '
        'the trip begins). Report it under the title of the trip, and hand the report in.',
        'Create and submit the report "{trip}". It has a single receipt: Railhouse, {amount} '
        'coins, kind travel, on the date of that trip.',
    )),
    one("submit_report", "submit_report", "reports", sets(state="submitted"), (
        'Submit the expense report "{title}".',
        'The report "{title}" is complete: hand it in.',
        'Send your expense report "{title}" off.',
    ), by="title", keep=lambda r: r["state"] in ("draft", "rejected"), held_out=True),
    total("report_total", "receipts", (
        'How many coins do the receipts of the report "{owner}" come to?',
        'Add up the receipts in the expense report "{owner}".',
        'What is the sum of the report "{owner}"?',
    ), key="report_id", value_of=lambda r: int(r["amount"]), keep=lambda r: bool(r["report_id"]),
        describe=named("reports", "title"), held_out=True),
)  # fmt: skip
