"""The address book."""

from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, App, Office, Param, page_of, require

ID = Param(name="id", kind="int", doc="id of the contact")
NAME = Param(name="name", kind="str", doc="name of the contact")
PHONE = Param(name="phone", kind="int", doc="phone extension")


def find(office: Office, name: str) -> Any:
    """Ids of the contacts with this name."""
    return [{"id": i} for i, _ in office.world.rows("contacts", name=name)]


def show(office: Office, id: int) -> Any:
    """One contact."""
    row = require(office, "contacts", id)
    return {"name": row["name"], "phone": row["phone"]}


def list_page(office: Office, page: int) -> Any:
    """All contacts, a page at a time."""
    return page_of(
        office, [{"id": i, "name": r["name"]} for i, r in office.world.rows("contacts")], page
    )


def add(office: Office, name: str, phone: int) -> None:
    """A new contact; names are unique."""
    if any(office.world.rows("contacts", name=name)):
        raise ApiError("conflict", "a contact of this name exists")
    office.world.insert("contacts", {"name": name, "phone": phone})


def update(office: Office, id: int, phone: int) -> None:
    """Change the phone of a contact."""
    require(office, "contacts", id)
    office.world.update("contacts", id, phone=phone)


def remove(office: Office, id: int) -> None:
    """Delete a contact."""
    require(office, "contacts", id)
    office.world.remove("contacts", id)


APP = App(
    name="contacts",
    doc="Address book: people, their ids and phone extensions.",
    apis=(
        Api(
            name="find",
            doc="Ids of the contacts with exactly this name.",
            params=(NAME,),
            handler=find,
        ),
        Api(name="show", doc="Name and phone of one contact.", params=(ID,), handler=show),
        Api(
            name="list",
            doc="All contacts, a page at a time.",
            params=(Param(name="page", kind="int", doc="page, counted from 1"),),
            handler=list_page,
        ),
        Api(name="add", doc="Add a contact.", params=(NAME, PHONE), handler=add, writes=True),
        Api(
            name="update",
            doc="Set the phone of a contact.",
            params=(ID, PHONE),
            handler=update,
            writes=True,
        ),
        Api(name="remove", doc="Delete a contact.", params=(ID,), handler=remove, writes=True),
    ),
)
