"""A shop: products, reviews, a cart, orders, returns, a wish list."""

from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, Office, Param
from loopwright.envs.officeworld.columns import ME, TODAY, choice, day, flag, number, ref, text
from loopwright.envs.officeworld.full.declare import OfficeApp, Seeding
from loopwright.envs.officeworld.resources import Resource
from loopwright.envs.officeworld.state import Row

PRODUCT = Resource(
    name="product",
    plural="products",
    table="products",
    doc="something the shop sells",
    verbs=("list", "search", "show", "count"),
    fields=(
        text("name", "what it is"),
        choice("category", "shelf", ("kitchen", "office", "garden", "sports", "toys", "books")),
        number("price", "whole coins"),
        number("stock", "pieces left"),
        number("rating", "mean of its reviews, 1 to 5"),
        text("color", "its color", filters=True),
        number("weight_g", "weight in grams", listed=False),
    ),
)
REVIEW = Resource(
    name="review",
    plural="reviews",
    table="reviews",
    doc="a review of a product",
    fields=(
        ref("product_id", "products", "id of the product", given="create"),
        text("author", "email address of who wrote it", default=ME, given="never", filters=True),
        number("stars", "1 to 5", low=1, high=5),
        text("text", "what it says", default=""),
        day("date", "when", default=TODAY, given="never"),
    ),
    guard=lambda office, row: mine(office, row),
)
CART = Resource(
    name="cart_item",
    plural="cart_items",
    table="cart",
    doc="something in your cart",
    verbs=("list", "show", "delete"),
    fields=(
        ref("product_id", "products", "id of the product"),
        number("quantity", "pieces", low=1, high=99),
    ),
)
ORDER = Resource(
    name="order",
    plural="orders",
    table="orders",
    doc="an order",
    verbs=("list", "show", "count"),
    fields=(
        ref("product_id", "products", "id of the product"),
        number("quantity", "pieces"),
        number("total", "coins paid"),
        ref("address_id", "addresses", "id of your address it goes to"),
        day("date", "when", default=TODAY),
        choice(
            "state",
            "where it is",
            ("ordered", "sent", "delivered", "cancelled", "returned"),
            default="ordered",
        ),
        flag("gift", "whether it is wrapped"),
    ),
    dated="date",
)
WISH = Resource(
    name="wish",
    plural="wishes",
    table="wishes",
    doc="an entry of your wish list",
    fields=(
        ref("product_id", "products", "id of the product", given="create"),
        choice("priority", "how much you want it", ("low", "normal", "high"), default="normal"),
        text("note", "why", default=""),
    ),
)
COUPON = Resource(
    name="coupon",
    plural="coupons",
    table="coupons",
    doc="a coupon",
    verbs=("list", "show"),
    fields=(
        text("code", "what to give at checkout"),
        number("percent", "off the price"),
        day("expires", "last day"),
    ),
)


def mine(office: Office, row: Row) -> None:
    """Only the author changes a review."""
    if row["author"] != office.profile["email"]:
        raise ApiError("forbidden", "only its author may change a review")


def add_to_cart(office: Office, product_id: int, quantity: int) -> Any:
    """More of a product in the cart."""
    product: Any = PRODUCT.row(office, product_id)
    for item_id, row in office.world.rows("cart", product_id=product_id):
        already: Any = row["quantity"]
        if already + quantity > product["stock"]:
            raise ApiError("conflict", f"only {product['stock']} left")
        CART.put(office, item_id, {"quantity": already + quantity})
        return {"id": item_id}
    if quantity > product["stock"]:
        raise ApiError("conflict", f"only {product['stock']} left")
    return {"id": CART.add(office, {"product_id": product_id, "quantity": quantity})}


def change_quantity(office: Office, cart_item_id: int, quantity: int) -> None:
    """Another number of pieces."""
    CART.put(office, cart_item_id, {"quantity": quantity})


def clear_cart(office: Office) -> None:
    """Nothing in the cart."""
    for item_id, _ in list(office.world.rows("cart")):
        office.world.remove("cart", item_id)


def show_cart_total(office: Office) -> Any:
    """What the cart costs."""
    return {"total": sum(_price(office, row) for _, row in office.world.rows("cart"))}


def _price(office: Office, row: Row) -> int:
    product: Any = PRODUCT.row(office, int(str(row["product_id"])))
    quantity: Any = row["quantity"]
    return int(product["price"] * quantity)


def place_order(office: Office, address_id: int, coupon: str, gift: bool) -> Any:
    """Order everything in the cart, one order per product."""
    items = list(office.world.rows("cart"))
    if not items:
        raise ApiError("conflict", "the cart is empty")
    if office.world.get("addresses", address_id) is None:
        raise ApiError("not_found", "no address of yours with this id", name="address_id")
    off: Any = 0
    if coupon:
        found = [r for _, r in office.world.rows("coupons", code=coupon)]
        if not found or str(found[0]["expires"]) < str(office.profile["today"]):
            raise ApiError("invalid_value", "no valid coupon of this code", name="coupon")
        off = found[0]["percent"]
    made = []
    for item_id, row in items:
        total = _price(office, row) * (100 - off) // 100
        given = {"product_id": row["product_id"], "quantity": row["quantity"], "total": total}
        made.append(ORDER.add(office, {**given, "address_id": address_id, "gift": gift}))
        office.world.remove("cart", item_id)
    return {"order_ids": made}


def _from_state(office: Office, order_id: int, source: str, to: str) -> None:
    state = ORDER.row(office, order_id)["state"]
    if state != source:
        raise ApiError("conflict", f"the order is {state}")
    office.world.update("orders", order_id, state=to)


def cancel_order(office: Office, order_id: int) -> None:
    """Before it is sent."""
    _from_state(office, order_id, "ordered", "cancelled")


def return_order(office: Office, order_id: int) -> None:
    """After it came."""
    _from_state(office, order_id, "delivered", "returned")


def redirect_order(office: Office, order_id: int, address_id: int) -> None:
    """To another address, before it is sent."""
    if ORDER.row(office, order_id)["state"] != "ordered":
        raise ApiError("conflict", "the order is on its way")
    ORDER.put(office, order_id, {"address_id": address_id})


COLORS = ("red", "green", "blue", "white", "black")
GOODS = {
    "kitchen": ("Kettle", "Whisk", "Tea pot", "Bread knife", "Pan"),
    "office": ("Stapler", "Desk lamp", "Notebook", "Pen set", "Tray"),
    "garden": ("Spade", "Watering can", "Hose", "Bird house", "Lantern"),
    "sports": ("Kite", "Yoga mat", "Dumbbell", "Helmet", "Racket"),
    "toys": ("Puzzle", "Wooden train", "Spinning top", "Marble run", "Yo-yo"),
    "books": ("Atlas", "Cookbook", "Mystery", "Almanac", "Field guide"),
}


def seed(s: Seeding) -> None:
    """A hundred and fifty products, reviews, orders, a few things in the cart."""
    rows: list[Row] = []
    for category, names in GOODS.items():
        goods = [(name, color) for name in names for color in COLORS]
        prices = s.rng.sample(range(4, 90), len(goods))  # one of a category is the cheapest
        for (name, color), price in zip(goods, prices, strict=True):
            rows.append(
                {
                    "name": f"{color.capitalize()} {name.lower()}",
                    "category": category,
                    "color": color,
                    "price": price,
                    "stock": s.rng.choice((0, 3, 12, 40)),
                    "rating": s.rng.randint(1, 5),
                    "weight_g": s.rng.randint(50, 4000),
                }
            )
    products = s.fill("products", rows)
    s.fill(
        "reviews",
        (
            {
                "product_id": s.rng.choice(products),
                "author": s.rng.choice([*s.people[:20], s.profile])["email"],
                "stars": s.rng.randint(1, 5),
                "text": s.rng.choice(("Solid.", "As described.", "Too small.", "A joy.")),
                "date": s.day(-300, -1),
            }
            for _ in range(90)
        ),
    )
    addresses = list(s.tables["addresses"])
    s.fill(
        "orders",
        sorted(
            (
                {
                    "product_id": s.rng.choice(products),
                    "quantity": s.rng.randint(1, 3),
                    "total": s.rng.randint(5, 200),
                    "address_id": s.rng.choice(addresses),
                    "date": s.day(-90, -1),
                    "state": s.rng.choice(
                        ("ordered", "sent", "delivered", "delivered", "cancelled")
                    ),
                    "gift": s.rng.random() < 0.2,
                }
                for _ in range(40)
            ),
            key=lambda row: str(row["date"]),
        ),
    )
    s.fill("wishes", ({"product_id": p} for p in s.rng.sample(products, 9)))
    s.fill(
        "cart",
        ({"product_id": p, "quantity": s.rng.randint(1, 3)} for p in s.rng.sample(products, 3)),
    )
    s.fill(
        "coupons",
        [
            {"code": f"SAVE{n}", "percent": n, "expires": s.day(d, d)}
            for n, d in ((10, 20), (25, -5))
        ],
    )


PRODUCT_ID, QUANTITY = (
    PRODUCT.id_param,
    Param(name="quantity", kind="int", doc="pieces", low=1, high=99, default=1),
)
ADDRESS = Param(name="address_id", kind="int", doc="id of an address in your vault")
APP = OfficeApp(
    name="shop",
    doc="A shop: products, reviews, your cart, orders and returns, wish list, coupons.",
    resources=(PRODUCT, REVIEW, CART, ORDER, WISH, COUPON),
    seed=seed,
    apis=(
        Api(
            name="add_to_cart",
            doc="Put pieces of a product into your cart.",
            params=(PRODUCT_ID, QUANTITY),
            handler=add_to_cart,
            writes=True,
            returns="id of the cart item",
        ),
        Api(
            name="change_quantity",
            doc="Set the pieces of a cart item.",
            params=(CART.id_param, QUANTITY),
            handler=change_quantity,
            writes=True,
        ),
        Api(name="clear_cart", doc="Empty your cart.", handler=clear_cart, writes=True),
        Api(
            name="show_cart_total",
            doc="What your cart costs.",
            handler=show_cart_total,
            returns="total",
        ),
        Api(
            name="place_order",
            doc="Order everything in your cart: one order per product, and an empty cart.",
            params=(
                ADDRESS,
                Param(name="coupon", kind="str", doc="code of a coupon", default=""),
                Param(name="gift", kind="bool", doc="whether to wrap it", default=False),
            ),
            handler=place_order,
            writes=True,
            returns="order_ids",
        ),
        Api(
            name="cancel_order",
            doc="Cancel an order that is not sent yet.",
            params=(ORDER.id_param,),
            handler=cancel_order,
            writes=True,
        ),
        Api(
            name="return_order",
            doc="Return an order that was delivered.",
            params=(ORDER.id_param,),
            handler=return_order,
            writes=True,
        ),
        Api(
            name="redirect_order",
            doc="Send an order elsewhere, before it is on its way.",
            params=(ORDER.id_param, ADDRESS),
            handler=redirect_order,
            writes=True,
        ),
    ),
)
