"""Shopping, and who is in the address book."""

from typing import Any

from loopwright.envs.officeworld.full.draw import Draw, call, plan
from loopwright.envs.officeworld.full.families import every, sets
from loopwright.envs.officeworld.scenario import Plan, Scenario

NEW_NAMES = ("Odile Tramway", "Basil Norwood", "Clementine Ash", "Rufus Halfpenny")


def _cart(draw: Draw) -> Plan:
    in_cart = {row["product_id"] for _, row in draw.rows("cart")}
    product_id, product = draw.pick("products", lambda p: p["stock"] >= 3)
    while product_id in in_cart:
        product_id, product = draw.pick("products", lambda p: p["stock"] >= 3)
    quantity = draw.rng.randint(1, 3)
    given = {"product_id": product_id, "quantity": quantity}
    return plan(
        {"product": product["name"], "quantity": quantity},
        [
            *draw.search("products", product["name"], product_id),
            call("shop.add_to_cart", **given),
        ],
        added=[draw.row("cart", **given)],
    )


def _order(draw: Draw) -> Plan:
    address_id, address = draw.pick("addresses")
    items = draw.rows("cart")
    coupon: Any = draw.rows("coupons", lambda c: c["expires"] >= draw.today)[0][1]
    added = []
    for _, item in items:
        product: Any = draw.world.get("products", item["product_id"])
        price = product["price"] * item["quantity"] * (100 - coupon["percent"]) // 100
        given = {"product_id": item["product_id"], "quantity": item["quantity"], "total": price}
        added.append(draw.row("orders", **given, address_id=address_id))
    return plan(
        {"kind": address["kind"]},
        [
            *draw.listing("addresses"),
            *draw.listing("coupons"),
            call("shop.place_order", address_id=address_id, coupon=coupon["code"]),
        ],
        added=added,
        removed=[("cart", i) for i, _ in items],
    )


def _review(draw: Draw) -> Plan:
    product_id, product = draw.pick("products")
    stars, text = (
        draw.rng.randint(1, 5),
        draw.rng.choice(("Sturdy.", "Not for me.", "Lovely color.")),
    )
    given = {"product_id": product_id, "stars": stars, "text": text}
    return plan(
        {"product": product["name"], "stars": stars, "text": text},
        [
            *draw.search("products", product["name"], product_id),
            call("shop.create_review", **given),
        ],
        added=[draw.row("reviews", **given)],
    )


def _cheapest(draw: Draw) -> Plan:
    category = draw.rng.choice(("kitchen", "office", "garden", "sports", "toys", "books"))
    rows = draw.rows("products", lambda p: p["category"] == category)
    product_id, _ = min(rows, key=lambda pair: pair[1]["price"])
    return plan(
        {"category": category},
        [
            *draw.listing("products", [product_id], category=category, sort_by="price"),
            call("shop.create_wish", product_id=product_id, priority="high"),
        ],
        added=[draw.row("wishes", product_id=product_id, priority="high")],
    )


def _return(draw: Draw) -> Plan:
    rows = draw.rows("orders", lambda o: o["state"] == "delivered")
    newest = max(o["date"] for _, o in rows)
    latest = [i for i, o in rows if o["date"] == newest]
    return plan(
        {"date": newest},
        [
            *draw.listing("orders", latest, state="delivered", sort_by="-date"),
            *(call("shop.return_order", order_id=i) for i in latest),
        ],
        changed=[("orders", i, {"state": "returned"}) for i in latest],
    )


def _add_contact(draw: Draw) -> Plan:
    name = draw.rng.choice(NEW_NAMES)
    email = f"{name.split()[0].lower()}@letterly.example"
    given = {
        "name": name,
        "email": email,
        "phone": f"199-{draw.rng.randint(1000, 9999)}",
        "relation": "client",
    }
    return plan(
        given, [call("contacts.create_contact", **given)], added=[draw.row("contacts", **given)]
    )


def _moved(draw: Draw) -> Plan:
    person = draw.relative()
    city = draw.rng.choice(
        [c for c in ("Alderport", "Dunhaven", "Fairholt") if c != person["city"]]
    )
    contact = draw.id_of(person)
    return plan(
        {"relation": person["relation"], "city": city},
        [
            *draw.look_up_relation(person),
            call("contacts.update_contact", contact_id=contact, city=city),
        ],
        changed=[("contacts", contact, {"city": city})],
    )


def _birthday(draw: Draw) -> Plan:
    person = draw.relative()
    return plan(
        {"relation": person["relation"]},
        [
            *draw.look_up_relation(person),
            call("contacts.show_contact", contact_id=draw.id_of(person)),
        ],
        answer=person["birthday"],
    )


def _friends_group(draw: Draw) -> Plan:
    city, rows = draw.pick_many("contacts", "city", 2, 20, lambda p: p["relation"] == "friend")
    members = tuple(i for i, _ in rows)
    name = f"Friends in {city}"
    return plan(
        {"city": city, "name": name},
        [
            *draw.listing("contacts", relation="friend", city=city),
            call("contacts.create_group", name=name, members=members),
        ],
        added=[draw.row("groups", name=name, members=members)],
    )


SCENARIOS = (
    Scenario(name="fill_cart", difficulty=1, build=_cart, texts=(
        'Put {quantity} of "{product}" into the shopping cart.',
        'Your cart should have {quantity} more of the product "{product}". Do not order yet.',
        'Add "{product}" to the cart, quantity {quantity}.',
    )),
    Scenario(name="order_cart", difficulty=3, build=_order, texts=(
        "Order what is in your shopping cart to your {kind} address. Use the coupon that is "
        "still valid.",
        "Place the order for your cart with the valid coupon of the shop; it goes to your {kind} "
        "address.",
        "Your {kind} address gets everything from the cart. Order it, and pay less with the "
        "coupon that has not expired.",
    )),
    Scenario(name="review_product", difficulty=1, build=_review, texts=(
        'Review "{product}" with {stars} stars: "{text}"',
        'Give the product "{product}" {stars} stars and write "{text}"',
        'Your opinion of "{product}" is {stars} stars, "{text}" Publish it as a review.',
    )),
    Scenario(name="wish_cheapest", difficulty=2, build=_cheapest, texts=(
        "Put the cheapest product of the category {category} on your wish list with high priority.",
        "What costs least among {category} products should be a high priority wish of yours.",
        "Find the lowest price in the {category} category, and wish for that product (priority "
        "high).",
    )),
    Scenario(name="return_latest", difficulty=2, build=_return, held_out=True, texts=(
        "Return what was delivered of your most recent delivered orders, those of {date}.",
        "Everything delivered from your orders of {date} goes back: return it.",
        "Return your delivered orders of {date}.",
    )),
    Scenario(name="add_contact", difficulty=1, build=_add_contact, texts=(
        "Add {name} to your contacts: email {email}, phone {phone}, relation client.",
        "New client: {name}, {email}, {phone}. Put them into the address book with the relation "
        "client.",
        "{name} ({phone}, {email}) is a client of yours now; create the contact, relation client.",
    )),
    Scenario(name="relative_moved", difficulty=1, build=_moved, texts=(
        "Your {relation} lives in {city} now. Update the contact.",
        "Change the city of your {relation} to {city} in the address book.",
        "Your {relation} moved to {city}; note that in contacts.",
    )),
    Scenario(name="ask_birthday", difficulty=1, build=_birthday, held_out=True, texts=(
        "When was your {relation} born? Answer with the date as YYYY-MM-DD.",
        "What is the date of birth of your {relation} (YYYY-MM-DD)?",
        "Find the birthday of your {relation}, with the year, and answer in the form YYYY-MM-DD.",
    )),
    Scenario(name="group_friends", difficulty=2, build=_friends_group, texts=(
        'Make a contact group "{name}" of your friends who live in {city}.',
        'Everybody with the relation friend in {city} belongs into a new contact group "{name}".',
        'Create the group "{name}": all contacts that are friends and live in {city}.',
    )),
    every("cancel_orders", "cancel_order", "orders", sets(state="cancelled"), (
        "Cancel every order in the shop that is not sent yet.",
        "Whatever you ordered and is not on its way: cancel it.",
        "All orders that are only ordered, not sent, are to be cancelled.",
    ), key="state", keep=lambda o: bool(o["state"] == "ordered")),
)  # fmt: skip
