"""The address book: people, and groups of them."""

from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, Office, Param
from loopwright.envs.officeworld.columns import choice, day, flag, many, text
from loopwright.envs.officeworld.full.declare import OfficeApp, Seeding
from loopwright.envs.officeworld.resources import Resource
from loopwright.envs.officeworld.state import Row

CONTACT = Resource(
    name="contact",
    plural="contacts",
    table="contacts",
    doc="a person of your address book",
    fields=(
        text("name", "first and last name"),
        text("email", "email address"),
        text("phone", "phone number, like 123-4567"),
        text(
            "relation", "what they are to you, like sister or colleague", default="", filters=True
        ),
        text("city", "where they live", default="", filters=True),
        text("company", "where they work", default="", filters=True, listed=False),
        text("job", "what they do", default="", listed=False),
        day("birthday", "date of birth", default="1990-01-01", listed=False),
        flag("favorite", "whether they are on your short list", listed=False),
    ),
    flags={"favorite": ("star", "unstar")},
    check=lambda office, contact_id, row: unique(office, contact_id, row),
)
GROUP = Resource(
    name="group",
    plural="groups",
    table="groups",
    doc="a group of contacts",
    fields=(
        text("name", "name of the group"),
        choice("kind", "what it is for", ("family", "work", "sport", "other"), default="other"),
        many("members", "contact ids", "contacts"),
    ),
    members={"members": ("add_to_group", "remove_from_group", "contact_id")},
)


def unique(office: Office, contact_id: int, row: Row) -> None:
    """Refuse a second person with the same address or number."""
    for what in ("email", "phone"):
        for other_id, other in office.world.rows("contacts"):
            if other[what] == row[what] and other_id != contact_id:
                raise ApiError("conflict", f"another contact has this {what}", name=what)


def list_relations(office: Office) -> Any:
    """Every relation with the number of people."""
    counts: dict[str, int] = {}
    for _, row in office.world.rows("contacts"):
        relation = str(row["relation"])
        counts[relation] = counts.get(relation, 0) + 1
    return [{"relation": name, "people": n} for name, n in sorted(counts.items())]


def _by(column: str, office: Office, value: str) -> Any:
    for row_id, row in office.world.rows("contacts"):
        if row[column] == value:
            return CONTACT.view(row_id, row, whole=True)
    raise ApiError("not_found", f"nobody with this {column}", name=column)


def show_contact_by_email(office: Office, email: str) -> Any:
    """Who has an email address."""
    return _by("email", office, email)


def show_contact_by_phone(office: Office, phone: str) -> Any:
    """Who has a phone number."""
    return _by("phone", office, phone)


def list_birthdays(office: Office, month: int) -> Any:
    """Birthdays of a month, by day."""
    rows = [(str(r["birthday"])[5:], i, r) for i, r in office.world.rows("contacts")]
    found = sorted((d, i, str(r["name"])) for d, i, r in rows if int(d[:2]) == month)
    return [{"id": i, "name": name, "day": d} for d, i, name in found]


def seed(s: Seeding) -> None:
    """The people are there already; some groups of them."""
    people = list(s.tables["contacts"].items())
    for name, kind, relation in (
        ("Family", "family", ("mother", "father", "sister", "brother")),
        ("Team Northlight", "work", ("colleague", "manager")),
        ("Rowing crew", "sport", ("teammate",)),
        ("Book circle", "other", ("friend",)),
    ):
        ids = [i for i, row in people if row["relation"] in relation]
        s.fill("groups", [{"name": name, "kind": kind, "members": tuple(ids[:6])}])


APP = OfficeApp(
    name="contacts",
    doc="Address book: people with email addresses, phone numbers and relations; groups of people.",
    resources=(CONTACT, GROUP),
    seed=seed,
    apis=(
        Api(
            name="list_relations",
            doc="Relations in your address book, with how many people.",
            handler=list_relations,
        ),
        Api(
            name="show_contact_by_email",
            doc="The contact with an email address.",
            params=(Param(name="email", kind="str", doc="the address"),),
            handler=show_contact_by_email,
        ),
        Api(
            name="show_contact_by_phone",
            doc="The contact with a phone number.",
            params=(Param(name="phone", kind="str", doc="like 123-4567"),),
            handler=show_contact_by_phone,
        ),
        Api(
            name="list_birthdays",
            doc="Birthdays of a month.",
            handler=list_birthdays,
            paged=True,
            params=(Param(name="month", kind="int", doc="1 to 12", low=1, high=12),),
        ),
    ),
)
