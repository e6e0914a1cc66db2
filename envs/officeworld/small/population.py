"""The seeded fictional population every app shares: people, and what lies in their books at the
start."""

from collections.abc import Sequence
from functools import lru_cache
from random import Random

from loopwright.envs.officeworld.state import Row, Tables

# fmt: off
FIRST_NAMES = (
    "Ada", "Arlo", "Bea", "Bram", "Cleo", "Cyrus", "Dora", "Dev", "Edda", "Enzo", "Faye", "Finn",
    "Gita", "Gus", "Hana", "Hugo", "Ines", "Ivo", "Jada", "Joel", "Kira", "Kurt", "Lena", "Luca",
    "Mara", "Milo", "Nell", "Noor", "Olga", "Otto", "Pia", "Paul", "Rosa", "Remy", "Sara", "Sven",
    "Tess", "Theo", "Uma", "Vera", "Vito", "Wren", "Yara", "Zeno",
)
# fmt: on
DAYS = ("mon", "tue", "wed", "thu", "fri")
TITLES = ("lunch", "gym", "call", "review", "demo", "walk")
COMPACT_NAMES = 24  # first names a world draws from, unless it has more people
WORDS = ("yes", "no", "late", "thanks", "ready", "sick", "busy", "hello")
EVENTS_A_DAY = 2
INBOX = 6


def draw_ids(rng: Random, count: int) -> list[int]:
    """`count` distinct ids; two digits as long as they suffice, and few different ones where few
    are needed: a policy that learns from nothing has to meet each often enough to copy it."""
    top = 40 if count <= 20 else 99 if count <= 60 else 10 + 4 * count
    return rng.sample(range(10, top), count)


def _events(rng: Random, people: Sequence[int]) -> dict[int, Row]:
    slots = [(day, title) for day in DAYS for title in rng.sample(TITLES, EVENTS_A_DAY)]
    events: dict[int, Row] = {}
    for event_id, (day, title) in zip(draw_ids(rng, len(slots)), slots, strict=True):
        guests = tuple(rng.sample(people, 2))
        events[event_id] = {
            "title": title,
            "day": day,
            "hour": rng.randrange(8, 18),
            "guests": guests,
        }
    return events


@lru_cache(maxsize=256)
def generate(seed: int, size: int) -> Tables:
    """The base of world `seed` with `size` people (4 … 44). The result is shared."""
    rng = Random(f"population/{seed}/{size}/False")
    people = draw_ids(rng, size)
    names = rng.sample(FIRST_NAMES[: max(COMPACT_NAMES, size)], size)
    contacts: dict[int, Row] = {
        i: {"name": name, "phone": rng.randrange(10, 40)}
        for i, name in zip(people, names, strict=True)
    }
    senders = rng.sample(people, min(INBOX, size))
    asking = rng.sample(senders, 2)
    inbox: dict[int, Row] = {}
    for message_id, sender in zip(draw_ids(rng, len(senders)), senders, strict=True):
        text = f"owe {rng.randrange(1, 20)}" if sender in asking else rng.choice(WORDS)
        inbox[message_id] = {"sender": sender, "text": text}
    requests: dict[int, Row] = {
        i: {"person": person, "amount": rng.randrange(1, 20), "state": "open"}
        for i, person in zip(draw_ids(rng, 3), rng.sample(people, 3), strict=True)
    }
    transfers: dict[int, Row] = {
        i: {"to": rng.choice(people), "amount": rng.randrange(1, 20)} for i in draw_ids(rng, 2)
    }
    return {
        "contacts": contacts,
        "account": {1: {"balance": rng.randrange(30, 70)}},
        "transfers": transfers,
        "requests": requests,
        "charges": {},
        "inbox": inbox,
        "sent": {},
        "events": _events(rng, people),
    }
