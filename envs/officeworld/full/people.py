"""The population of the full world: the user, and everybody in the address book with a relation to
the user."""

from random import Random

from loopwright.envs.officeworld.full.declare import shifted
from loopwright.envs.officeworld.state import Row

FIRST = (
    "Ada",
    "Alma",
    "Anouk",
    "Arlo",
    "Asa",
    "Bea",
    "Bram",
    "Briar",
    "Cleo",
    "Cyrus",
    "Dalia",
    "Dev",
    "Dora",
    "Edda",
    "Emil",
    "Enzo",
    "Esme",
    "Faye",
    "Finn",
    "Freya",
    "Gita",
    "Gus",
    "Hana",
    "Hedy",
    "Hugo",
    "Ines",
    "Ivo",
    "Jada",
    "Joel",
    "Jonas",
    "Kaya",
    "Kira",
    "Kurt",
    "Lena",
    "Levi",
    "Luca",
    "Maeve",
    "Mara",
    "Milo",
    "Mira",
    "Nell",
    "Noor",
    "Olga",
    "Orin",
    "Otto",
    "Paul",
    "Pia",
    "Quinn",
    "Remy",
    "Rosa",
    "Runa",
    "Sara",
    "Silas",
    "Sven",
    "Tess",
    "Theo",
    "Tilda",
    "Uma",
    "Vera",
    "Vito",
    "Wren",
    "Xenia",
    "Yara",
    "Yusuf",
    "Zeno",
    "Zora",
)
LAST = (
    "Amberly",
    "Birchall",
    "Brock",
    "Calder",
    "Corrigan",
    "Dunmore",
    "Eastwick",
    "Farrow",
    "Fenwick",
    "Gale",
    "Grieve",
    "Holloway",
    "Inskip",
    "Joplin",
    "Kestrel",
    "Lark",
    "Lindqvist",
    "Marlow",
    "Mosswood",
    "Nightingale",
    "Okoro",
    "Pemberton",
    "Quill",
    "Rasmussen",
    "Sorrel",
    "Thackeray",
    "Underhill",
    "Vance",
    "Wexford",
    "Yarrow",
)
CITIES = (
    "Alderport",
    "Brightwater",
    "Cindermoor",
    "Dunhaven",
    "Elmsgate",
    "Fairholt",
    "Greyharbor",
    "Hollowford",
)
COMPANIES = (
    "Northlight Labs",
    "Tallow & Finch",
    "Bluepine Studio",
    "Harrow Freight",
    "Quietbay Clinic",
)
JOBS = (
    "accountant",
    "architect",
    "baker",
    "engineer",
    "florist",
    "nurse",
    "painter",
    "teacher",
    "translator",
    "welder",
)
UNIQUE = (
    "mother",
    "father",
    "sister",
    "brother",
    "partner",
    "manager",
    "assistant",
    "roommate",
    "landlord",
    "doctor",
    "dentist",
    "neighbor",
    "mentor",
    "accountant",
)
GROUPS = (("colleague", 26), ("friend", 30), ("cousin", 8), ("teammate", 12))  # the rest: client
OWN_COMPANY = COMPANIES[0]


def draw_people(rng: Random, count: int) -> tuple[Row, list[Row]]:
    """The user's profile, and `count` people of the address book (names, email addresses and phone
    numbers are unique)."""
    names = rng.sample([f"{first} {last}" for first in FIRST for last in LAST], count + 1)
    phones = rng.sample(range(2_000_000, 9_999_999), count + 1)
    relations = [*UNIQUE, *(name for name, many in GROUPS for _ in range(many))]
    relations += ["client"] * (count - len(relations))
    today = shifted("2031-01-06", rng.randrange(300))
    rows: list[Row] = [_person(rng, name, phone) for name, phone in zip(names, phones, strict=True)]
    people: list[Row] = [
        {
            **row,
            "relation": relation,
            "company": OWN_COMPANY
            if relation in ("colleague", "manager", "assistant")
            else row["company"],
        }
        for row, relation in zip(rows[1:], relations, strict=False)
    ]
    rng.shuffle(people)
    me = rows[0]
    kept = ("name", "email", "phone", "birthday", "city")
    return {**{k: me[k] for k in kept}, "today": today}, people


def _person(rng: Random, name: str, phone: int) -> Row:
    first, last = name.lower().split()
    return {
        "name": name,
        "email": f"{first}.{last}@{rng.choice(('postbox', 'letterly', 'inkmail'))}.example",
        "phone": f"{phone // 10000:03d}-{phone % 10000:04d}",
        "birthday": f"{rng.randint(1960, 2008)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        "city": rng.choice(CITIES),
        "company": rng.choice(COMPANIES),
        "job": rng.choice(JOBS),
        "relation": "",
    }
