"""Short messages by phone number, and rooms for many."""

from typing import Any

from loopwright.envs.officeworld.api import LONG_TEXT_CHARS, Api, ApiError, Office, Param
from loopwright.envs.officeworld.columns import ME, TODAY, choice, day, flag, many, ref, text
from loopwright.envs.officeworld.full.declare import OfficeApp, Seeding
from loopwright.envs.officeworld.resources import Resource

MESSAGE = Resource(
    name="message",
    plural="messages",
    table="messages",
    doc="a short message",
    verbs=("list", "search", "show", "delete", "count"),
    fields=(
        choice("direction", "whether you got or sent it", ("in", "out"), default="out"),
        text("phone", "number of the other person", refers="phone", filters=True),
        text("text", "what it says"),
        day("date", "when it was sent", default=TODAY),
        flag("read", "whether you have read it", default=True),
        flag("pinned", "whether it stays on top"),
    ),
    dated="date",
    flags={"read": ("mark_read", "mark_unread"), "pinned": ("pin", "unpin")},
)
ROOM = Resource(
    name="room",
    plural="rooms",
    table="rooms",
    doc="a room where many write",
    fields=(
        text("name", "name of the room"),
        text("topic", "what it is about", default=""),
        many("members", "phone numbers of the others", "phone", listed=False),
        flag("muted", "whether it makes no sound"),
        flag("archived", "whether it is put away"),
    ),
    flags={"muted": ("mute", "unmute"), "archived": ("archive", "unarchive")},
    members={"members": ("add_member_to_room", "remove_member_from_room", "phone")},
)
POST = Resource(
    name="post",
    plural="posts",
    table="posts",
    doc="what somebody wrote in a room",
    verbs=("list", "search", "show", "delete", "count"),
    fields=(
        ref("room_id", "rooms", "id of the room"),
        text("author", "email address of who wrote it", default=ME, filters=True),
        text("text", "what it says"),
        day("date", "when", default=TODAY),
        many("likes", "email addresses of who liked it", listed=False),
    ),
    dated="date",
    guard=lambda office, row: own_post(office, row["author"]),
)
QUICK = Resource(
    name="template",
    plural="templates",
    table="message_templates",
    doc="a text kept for reuse",
    verbs=("list", "show", "create", "update", "delete"),
    fields=(text("name", "name of the template"), text("text", "what it says")),
)


def own_post(office: Office, author: object) -> None:
    """Only the author changes a post."""
    if author != office.profile["email"]:
        raise ApiError("forbidden", "only its author may do this")


def send_message(office: Office, phone: str, text: str) -> Any:
    """Send a message to a number."""
    return {"id": MESSAGE.add(office, {"phone": phone, "text": text})}


def post_to_room(office: Office, room_id: int, text: str) -> Any:
    """Write in a room."""
    if ROOM.row(office, room_id)["archived"]:
        raise ApiError("conflict", "the room is archived")
    return {"id": POST.add(office, {"room_id": room_id, "text": text})}


def _like(office: Office, post_id: int, *, add: bool) -> None:
    row: Any = POST.row(office, post_id)
    me = office.profile["email"]
    if (me in row["likes"]) is add:
        raise ApiError("conflict", "nothing changes")
    others = tuple(m for m in row["likes"] if m != me)
    office.world.update("posts", post_id, likes=(*others, str(me)) if add else others)


def like_post(office: Office, post_id: int) -> None:
    """Like a post."""
    _like(office, post_id, add=True)


def unlike_post(office: Office, post_id: int) -> None:
    """Take a like back."""
    _like(office, post_id, add=False)


TEXTS = (
    "Running ten minutes late, sorry!",
    "Did you see the game last night?",
    "Call me when you are free.",
    "The key is under the blue pot.",
    "Thanks for yesterday, it was lovely.",
    "Which train do you take?",
    "I left my scarf at your place.",
    "Dinner at ours next week?",
    "The plumber comes at nine.",
    "Could you water the plants?",
    "Happy to help, any time.",
    "The code for the door has changed.",
)


def seed(s: Seeding) -> None:
    """Two hundred messages, six rooms with posts."""
    s.fill(
        "messages",
        sorted(
            (
                {
                    "direction": s.rng.choice(("in", "in", "out")),
                    "phone": s.rng.choice(s.people)["phone"],
                    "text": s.rng.choice(TEXTS),
                    "date": s.day(-90, 0),
                    "read": s.rng.random() < 0.7,
                    "pinned": s.rng.random() < 0.05,
                }
                for _ in range(200)
            ),
            key=lambda row: str(row["date"]),
        ),
    )
    names = (
        "Harbor run",
        "Lunch club",
        "Flat share",
        "Chess nights",
        "Garden plot 7",
        "Film choice",
    )
    rooms = s.fill(
        "rooms",
        (
            {
                "name": name,
                "topic": f"Everything about {name.lower()}",
                "muted": s.rng.random() < 0.3,
                "members": tuple(str(p["phone"]) for p in s.rng.sample(s.people, 6)),
            }
            for name in names
        ),
    )
    s.fill(
        "posts",
        sorted(
            (
                {
                    "room_id": s.rng.choice(rooms),
                    "text": s.rng.choice(TEXTS),
                    "date": s.day(-40, 0),
                    "author": s.rng.choice([*s.people[:20], s.profile])["email"],
                }
                for _ in range(80)
            ),
            key=lambda row: str(row["date"]),
        ),
    )
    s.fill("message_templates", [{"name": "late", "text": "I am late, start without me."}])


TEXT = Param(name="text", kind="str", doc="what it says", max_chars=LONG_TEXT_CHARS)
APP = OfficeApp(
    name="messages",
    doc="Short messages by phone number, rooms for many with posts, and templates.",
    resources=(MESSAGE, ROOM, POST, QUICK),
    seed=seed,
    apis=(
        Api(
            name="send_message",
            doc="Send a short message.",
            handler=send_message,
            writes=True,
            params=(Param(name="phone", kind="str", doc="number of a person you know"), TEXT),
            returns="id",
        ),
        Api(
            name="post_to_room",
            doc="Write in a room.",
            params=(ROOM.id_param, TEXT),
            handler=post_to_room,
            writes=True,
            returns="id",
        ),
        Api(
            name="like_post",
            doc="Like a post.",
            params=(POST.id_param,),
            handler=like_post,
            writes=True,
        ),
        Api(
            name="unlike_post",
            doc="Take a like back.",
            params=(POST.id_param,),
            handler=unlike_post,
            writes=True,
        ),
    ),
)
