"""Notebooks, notes with tags, checklists."""

from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, Office, Param
from loopwright.envs.officeworld.columns import (
    TODAY,
    Move,
    choice,
    day,
    flag,
    many,
    number,
    ref,
    text,
)
from loopwright.envs.officeworld.full.declare import OfficeApp, Seeding
from loopwright.envs.officeworld.resources import Resource
from loopwright.envs.officeworld.state import Row

NOTEBOOK = Resource(
    name="notebook",
    plural="notebooks",
    table="notebooks",
    doc="a notebook",
    fields=(
        text("name", "its name"),
        choice("color", "its color", ("red", "green", "blue", "gray"), default="gray"),
        flag("locked", "whether its notes can be changed", given="never"),
    ),
    flags={"locked": ("lock", "unlock")},
)


def writable(office: Office, row: Row) -> None:
    """Notes of a locked notebook stay as they are."""
    book = office.world.get("notebooks", int(str(row["notebook_id"])))
    if book is not None and book["locked"]:
        raise ApiError("forbidden", "the notebook is locked")


NOTE = Resource(
    name="note",
    plural="notes",
    table="notes",
    doc="a note",
    fields=(
        text("title", "its title"),
        ref("notebook_id", "notebooks", "id of its notebook"),
        text("text", "what it says", default="", listed=False),
        many("tags", "words it can be found by", listed=False),
        day("date", "when it was written", default=TODAY, given="never"),
        flag("pinned", "whether it stays on top"),
        choice("state", "where it is", ("active", "archived"), default="active", given="never"),
    ),
    dated="date",
    flags={"pinned": ("pin", "unpin")},
    members={"tags": ("add_tag_to_note", "remove_tag_from_note", "tag")},
    moves=(
        Move(verb="archive", field="state", to="archived"),
        Move(verb="unarchive", field="state", to="active"),
    ),
    guard=writable,
)
CHECKLIST = Resource(
    name="checklist",
    plural="checklists",
    table="checklists",
    doc="a checklist",
    fields=(text("title", "its title"), day("due", "until when", default="2032-12-31")),
)
ITEM = Resource(
    name="item",
    plural="items",
    table="check_items",
    doc="a line of a checklist",
    fields=(
        ref("checklist_id", "checklists", "id of its checklist"),
        text("text", "what it says"),
        number("quantity", "how many", default=1, low=1, high=99),
        flag("done", "whether it is ticked"),
    ),
    flags={"done": ("tick", "untick")},
)


def append_to_note(office: Office, note_id: int, text: str) -> None:
    """A further line at the end."""
    before = str(NOTE.row(office, note_id)["text"])
    NOTE.put(office, note_id, {"text": f"{before}\n{text}" if before else text})


def list_tags(office: Office) -> Any:
    """Every tag with the number of notes."""
    counts: dict[str, int] = {}
    for _, row in office.world.rows("notes"):
        tags: Any = row["tags"]
        for tag in tags:
            counts[tag] = counts.get(tag, 0) + 1
    return [{"tag": tag, "notes": n} for tag, n in sorted(counts.items())]


def untick_all(office: Office, checklist_id: int) -> None:
    """Begin a checklist anew."""
    CHECKLIST.row(office, checklist_id)
    for item_id, _ in list(office.world.rows("check_items", checklist_id=checklist_id, done=True)):
        office.world.update("check_items", item_id, done=False)


TOPICS = (
    "Sourdough",
    "Tent repair",
    "Bird list",
    "Packing",
    "Ideas",
    "Gift",
    "Piano",
    "Irregular verbs",
    "Wine",
    "Trail",
    "Password rules",
    "Moving house",
)
KINDS = ("log", "plan", "summary", "questions")
TAGS = ("home", "work", "travel", "food", "later", "important")


def seed(s: Seeding) -> None:
    """Five notebooks, forty-eight notes of different titles, five checklists."""
    books = s.fill(
        "notebooks",
        (
            {"name": name, "locked": name == "Diary"}
            for name in ("Home", "Work", "Hobbies", "Diary", "Scraps")
        ),
    )
    diary = books[3]  # locked: all that lies in it is archived
    places = {f"{topic} {kind}": s.rng.choice(books) for topic in TOPICS for kind in KINDS}
    s.fill(
        "notes",
        (
            {
                "title": title,
                "notebook_id": book,
                "date": s.day(-200, 0),
                "text": f"First thoughts on {title.lower()}.",
                "pinned": s.rng.random() < 0.15,
                "tags": tuple(s.rng.sample(TAGS, s.rng.randint(0, 3))),
                "state": "archived"
                if book == diary
                else s.rng.choice(("active", "active", "archived")),
            }
            for title, book in places.items()
        ),
    )
    lists = s.fill(
        "checklists",
        (
            {"title": t, "due": s.day(1, 40)}
            for t in ("Groceries", "Suitcase", "Spring cleaning", "Party", "Hardware store")
        ),
    )
    things = (
        "apples",
        "candles",
        "screws",
        "towels",
        "rice",
        "batteries",
        "soap",
        "tape",
        "lemons",
        "napkins",
    )
    s.fill(
        "check_items",
        (
            {
                "checklist_id": c,
                "text": t,
                "quantity": s.rng.randint(1, 6),
                "done": s.rng.random() < 0.4,
            }
            for c in lists
            for t in s.rng.sample(things, 6)
        ),
    )


APP = OfficeApp(
    name="notes",
    doc="Notebooks, notes with tags, checklists.",
    resources=(NOTEBOOK, NOTE, CHECKLIST, ITEM),
    seed=seed,
    apis=(
        Api(
            name="append_to_note",
            doc="Add a line at the end of a note.",
            params=(NOTE.id_param, Param(name="text", kind="str", doc="the line")),
            handler=append_to_note,
            writes=True,
        ),
        Api(
            name="list_tags",
            doc="Every tag with how many notes have it.",
            handler=list_tags,
            paged=True,
        ),
        Api(
            name="untick_all",
            doc="Untick every line of a checklist.",
            params=(CHECKLIST.id_param,),
            handler=untick_all,
            writes=True,
        ),
    ),
)
