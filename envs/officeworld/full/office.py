"""The edition of style `full`: worlds and dialects from seeds, splits by scenario, observations as
JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import Any

from loopwright.envs.actions import Call, Fault, render_action
from loopwright.envs.officeworld.api import STATUS, Api, ApiError, App, Office, table_of
from loopwright.envs.officeworld.dialect import Dialect, draw_dialect
from loopwright.envs.officeworld.edition import NAME, BadOption, OracleCall
from loopwright.envs.officeworld.full.apps import APIS, APPS, DECLARED, RESOURCES, TRAINING_APPS
from loopwright.envs.officeworld.full.declare import Seeding
from loopwright.envs.officeworld.full.draw import Draw
from loopwright.envs.officeworld.full.oracle import solve
from loopwright.envs.officeworld.full.people import draw_people
from loopwright.envs.officeworld.full.scenarios import SCENARIOS
from loopwright.envs.officeworld.scenario import Plan, Scenario
from loopwright.envs.officeworld.state import Row, Tables, World
from loopwright.envs.protocol import Task

POPULATIONS = 16  # a split: bases are shared by all tasks drawn in them, about 3 MB each
DIALECTS = 64  # a split
PAGE_SIZE = 6
MAX_SHOWN_CHARS = 9000  # about 3,000 tokens; longer results are cut at a line
FIXED = frozenset({"docs", "vault"})  # where an agent starts from: they speak no dialect
TRAINING_APIS: Mapping[str, Api] = table_of(TRAINING_APPS.values())


@lru_cache(maxsize=2 * POPULATIONS)
def generate(seed: int, people: int) -> Tables:
    """The base of world `seed`: everything that lies in the apps at the start. Shared, never
    changed."""
    profile, contacts = draw_people(Random(f"people/{seed}"), people)
    tables: dict[str, dict[int, Row]] = {"profile": {1: profile}, "accounts": {}}
    Seeding(Random(f"ids/{seed}"), profile, tables, RESOURCES).fill("contacts", contacts)
    passwords = Random(f"passwords/{seed}")
    for index, app in enumerate(app for app in DECLARED.values() if app.account):
        secret = "".join(passwords.choices("abcdefghijkmnpqrstuvwxyz23456789", k=10))
        row: Row = {"app": app.name, "username": profile["email"], "password": secret}
        tables["accounts"][index + 1] = row
    for app in sorted(DECLARED.values(), key=lambda app: (app.account, app.name)):
        for table in (*(r.table for r in app.resources), *app.tables):
            tables.setdefault(table, {})
        if app.seed is not None:  # files first of all would not do: shop wants the addresses
            app.seed(Seeding(Random(f"{app.name}/{seed}"), profile, tables, RESOURCES))
    return tables


@lru_cache(maxsize=2 * DIALECTS)
def dialect_of(seed: int, training: bool) -> Dialect:
    """The names of one world; in training the held-out apps do not exist."""
    return draw_dialect(seed, TRAINING_APIS if training else APIS, FIXED)


class FullOffice:
    """The edition for language models. Test scenarios are never trained on, and two apps exist in
    the test split only; people, their data and dialects of the splits differ by the parity of their
    seeds."""

    formats: Sequence[str] = ("call", "json", "code")
    sizes = (120, 100, 400)
    max_turns = 50
    apps: Mapping[str, App] = APPS
    apis: Mapping[str, Api] = APIS
    scenarios: Mapping[str, Scenario] = SCENARIOS

    def tasks(self, chosen: Sequence[Scenario], split: str, seed: int) -> Iterator[Task]:
        """In the order that scenario goal completion needs: the three variants of a scenario one
        after the other (`payload["group"]` is the same), all scenarios once before any comes
        again."""
        mine = [s for s in chosen if s.held_out == (split == "test")]
        if not mine:
            raise BadOption(
                f"officeworld: none of the chosen scenarios is in the {split} split: "
                f"{', '.join(s.name for s in chosen)}"
            )
        return self._stream(mine, split, Random(f"full-tasks/{split}/{seed}"))

    def _stream(self, mine: list[Scenario], split: str, rng: Random) -> Iterator[Task]:
        while True:
            for scenario in rng.sample(mine, len(mine)):
                group = f"{scenario.name}-{rng.getrandbits(40):x}"
                for variant in (1, 2, 3):
                    yield Task(
                        environment=NAME,
                        id=f"{group}-{variant}",
                        seed=2 * rng.getrandbits(46) + (split == "test"),
                        split=split,
                        scenario=scenario.name,
                        difficulty=scenario.difficulty,
                        payload={"variant": variant, "group": group},
                    )

    def open(self, task: Task, variant: int, people: int) -> tuple[Plan, Office]:
        """A world and the task in it, from the task's seed."""
        rng = Random(f"full-task/{task.scenario}/{variant}/{task.seed}")
        held_out = task.seed % 2 == 1
        base = generate(2 * rng.randrange(POPULATIONS) + held_out, people)
        dialect = dialect_of(2 * rng.randrange(DIALECTS) + held_out, not held_out)
        draw = Draw(world=World(base), rng=rng, page_size=PAGE_SIZE, variant=variant)
        plan = SCENARIOS[task.scenario].build(draw)
        office = Office(
            world=World(base),
            apps=APPS if held_out else TRAINING_APPS,
            apis=APIS,
            dialect=dialect,
            page_size=PAGE_SIZE,
        )
        return plan, office

    def oracle(self, plan: Plan, office: Office) -> Sequence[OracleCall]:
        """Read the documentation, log in, look up, act."""
        return solve(plan, office)

    def system(self, action_format: str, office: Office) -> str:
        """Who the user is, how calls are written, where everything is documented."""
        profile = office.profile
        return _RULES.format(
            name=profile["name"], email=profile["email"], today=profile["today"],
            how=_how(action_format),
        )  # fmt: skip

    def shown(self, api: str, value: Any) -> str:
        """JSON, a line per entry of a list, cut where it is too long."""
        if isinstance(value, list):
            text = "[" + ",\n ".join(json.dumps(item, ensure_ascii=False) for item in value) + "]"
        else:
            text = json.dumps({"status": "ok"} if value is None else value, ensure_ascii=False)
        return clipped(text)

    def refused(self, error: ApiError) -> str:
        """Status, code, message."""
        return json.dumps({"error": failure(error)}, ensure_ascii=False)

    def misread(self, fault: Fault) -> str:
        """What would have been an action."""
        return json.dumps({"error": {"code": fault.category, "message": fault.hint}})


def failure(error: ApiError) -> dict[str, Any]:
    """An error as the APIs of the full world report it."""
    name = "".join(c if c.isprintable() else "?" for c in error.name[:40])
    detail = error.detail + (f" (argument {name})" if name and name not in error.detail else "")
    status = STATUS.get(error.category, 400)
    return {"status": status, "code": error.category, "message": detail}


def clipped(text: str) -> str:
    """At most `MAX_SHOWN_CHARS`, cut after a whole line, with a notice."""
    if len(text) <= MAX_SHOWN_CHARS:
        return text
    cut = text.rfind("\n", 0, MAX_SHOWN_CHARS)
    kept = text[: cut if cut > 0 else MAX_SHOWN_CHARS]
    return f"{kept}\n[{len(text) - len(kept)} more characters: ask for less at a time]"


_RULES = """You do office work for {name} ({email}) through the APIs of several apps. Today is \
{today}.
{how}
Everything is documented, and names and parameters differ from office to office, so look up before \
you call: docs.show_app_descriptions lists the apps, docs.show_api_descriptions(app) the APIs of \
an app, docs.show_api_doc(app, api) the parameters of one. Most APIs need the access token that \
the app's login gives; the vault app knows usernames and passwords. Lists come in pages: one page \
is seldom all. Work with what the apps say, never with made-up or dummy values, and change nothing \
that you were not asked to change. If a call fails, read the error and try again."""
_EXAMPLE = Call(name="docs.show_api_descriptions", arguments={"app": "contacts"})
_CODE = """Write Python in one ```python block per turn; you see what it prints. Call an API as
print(apis.docs.show_api_descriptions(app="contacts"))
with keyword arguments only; a refused call raises ApiError (with .code). Variables are kept from \
turn to turn; only computation is possible besides, no files and no network. When the task is \
complete, call apis.done(), or, if it is a question, apis.done(answer=...)."""


def _how(action_format: str) -> str:
    if action_format == "code":
        return _CODE
    form: Any = action_format
    example = render_action(_EXAMPLE, form)
    finish = render_action(Call(name="done"), form)
    answer = render_action(Call(name="done", arguments={"answer": 42}), form)
    return (
        f"Write exactly one API call per turn and nothing after it, like this:\n{example}\n"
        f"When the task is complete, finish with {finish}, or, if it is a question, with {answer}."
    )
