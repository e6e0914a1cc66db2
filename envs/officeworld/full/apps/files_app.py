"""Files in folders, shared with others, with links."""

from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, Office, Param
from loopwright.envs.officeworld.columns import TODAY, choice, day, flag, many, number, ref, text
from loopwright.envs.officeworld.full.declare import OfficeApp, Seeding
from loopwright.envs.officeworld.resources import Resource
from loopwright.envs.officeworld.state import Row

KINDS = ("document", "table", "picture", "sound", "archive")


def unlocked(_office: Office, row: Row) -> None:
    """Locked files are not changed."""
    if row["locked"]:
        raise ApiError("forbidden", "the file is locked")


FOLDER = Resource(
    name="folder",
    plural="folders",
    table="folders",
    doc="a folder",
    fields=(
        text("name", "its name"),
        text("about", "what is in it", default="", listed=False),
        flag("pinned", "whether it stays on top"),
    ),
    flags={"pinned": ("pin", "unpin")},
)
FILE = Resource(
    name="file",
    plural="files",
    table="files",
    doc="a file",
    fields=(
        text("name", "its name with the ending"),
        ref("folder_id", "folders", "id of the folder it lies in"),
        choice("kind", "what it holds", KINDS, default="document"),
        number("size_kb", "its size in kilobytes", default=1, low=0, given="create"),
        day("modified", "when it was changed last", default=TODAY, given="never"),
        text("text", "what is written in it", default="", listed=False),
        many("shared_with", "email addresses of who may read it", "email", listed=False),
        flag("starred", "whether it has a star"),
        flag("locked", "whether it can be changed", given="create"),
    ),
    dated="modified",
    search=("name", "text"),
    flags={"starred": ("star", "unstar"), "locked": ("lock", "unlock")},
    members={"shared_with": ("share_file", "unshare_file", "email")},
    guard=unlocked,
)
LINK = Resource(
    name="link",
    plural="links",
    table="links",
    doc="a link to a file for anybody",
    verbs=("list", "show", "create", "update", "delete", "count"),
    fields=(
        ref("file_id", "files", "id of the file", given="create"),
        day("expires", "last day it works"),
        flag("editable", "whether readers may change the file"),
    ),
)
REMARK = Resource(
    name="remark",
    plural="remarks",
    table="remarks",
    doc="a remark on a file",
    fields=(ref("file_id", "files", "id of the file"), text("text", "what it says")),
)


def move_file(office: Office, file_id: int, folder_id: int) -> None:
    """Into another folder."""
    if FILE.row(office, file_id)["folder_id"] == folder_id:
        raise ApiError("conflict", "the file lies there already")
    FILE.put(office, file_id, {"folder_id": folder_id})


def copy_file(office: Office, file_id: int, folder_id: int) -> Any:
    """A copy, shared with nobody."""
    row = FILE.row(office, file_id)
    kept = {k: row[k] for k in ("name", "kind", "size_kb", "text")}
    return {"id": FILE.add(office, {**kept, "folder_id": folder_id})}


def show_storage(office: Office) -> Any:
    """Kilobytes per folder."""
    sizes: dict[int, int] = {}
    for _, row in office.world.rows("files"):
        folder: Any = row["folder_id"]
        size: Any = row["size_kb"]
        sizes[folder] = sizes.get(folder, 0) + size
    return [
        {"folder_id": i, "name": row["name"], "size_kb": sizes.get(i, 0)}
        for i, row in office.world.rows("folders")
    ]


NAMES = (
    "minutes",
    "invoice",
    "photo",
    "plan",
    "list",
    "sketch",
    "recipe",
    "contract",
    "memo",
    "ticket",
    "scan",
    "offer",
)
ENDINGS = {"document": "txt", "table": "csv", "picture": "png", "sound": "ogg", "archive": "zip"}


def seed(s: Seeding) -> None:
    """Seven folders with about a hundred and twenty files; names are unique."""
    folders = s.fill(
        "folders",
        (
            {"name": name, "about": f"All about {name.lower()}", "pinned": name == "Work"}
            for name in ("Work", "Family", "Taxes", "Pictures", "Music", "Recipes", "Old things")
        ),
    )
    numbers = s.rng.sample(range(10, 999), 120)
    rows: list[Row] = []
    for n in numbers:
        kind = s.rng.choice(KINDS)
        rows.append(
            {
                "name": f"{s.rng.choice(NAMES)}_{n}.{ENDINGS[kind]}",
                "folder_id": s.rng.choice(folders),
                "kind": kind,
                "size_kb": s.rng.randint(1, 9000),
                "modified": s.day(-400, 0),
                "text": f"Page one of {n}." if kind == "document" else "",
                "shared_with": tuple(
                    str(p["email"]) for p in s.rng.sample(s.people, s.rng.choice((0, 0, 1, 2)))
                ),
                "starred": s.rng.random() < 0.12,
                "locked": s.rng.random() < 0.06,
            }
        )
    files = s.fill("files", rows)
    s.fill(
        "links",
        (
            {"file_id": f, "expires": s.day(-30, 60), "editable": s.rng.random() < 0.3}
            for f in s.rng.sample(files, 12)
        ),
    )
    s.fill("remarks", ({"file_id": f, "text": "Still needed?"} for f in s.rng.sample(files, 8)))


INTO = Param(name="folder_id", kind="int", doc="id of the folder it goes to")
APP = OfficeApp(
    name="files",
    doc="Files in folders: share, lock, copy, link and comment them.",
    resources=(FOLDER, FILE, LINK, REMARK),
    seed=seed,
    apis=(
        Api(
            name="move_file",
            doc="Put a file into another folder.",
            params=(FILE.id_param, INTO),
            handler=move_file,
            writes=True,
        ),
        Api(
            name="copy_file",
            doc="Copy a file; the copy is shared with nobody.",
            params=(FILE.id_param, INTO),
            handler=copy_file,
            writes=True,
            returns="id",
        ),
        Api(name="show_storage", doc="Kilobytes per folder.", handler=show_storage),
    ),
)
