"""What resources generate: every API of every table behaves as its documentation says, and a new
app is one declaration."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from loopwright.envs.officeworld.api import Api, ApiError, Office, invoke, table_of
from loopwright.envs.officeworld.columns import Field, Move, clock, flag, many, number, ref, text
from loopwright.envs.officeworld.dialect import Dialect, Paging, draw_dialect
from loopwright.envs.officeworld.full.apps import APIS, APP_OF, APPS, DECLARED, RESOURCES
from loopwright.envs.officeworld.full.declare import OfficeApp, Seeding
from loopwright.envs.officeworld.full.office import generate
from loopwright.envs.officeworld.resources import Resource
from loopwright.envs.officeworld.state import World

CREATED = [table for table, r in RESOURCES.items() if {"create", "show"} <= set(r.verbs)]


def plain(apis: dict[str, Api]) -> dict[str, Api]:
    """The same APIs, open to everybody."""
    return {name: replace(api, public=True) for name, api in apis.items()}


def office_of(apis: dict[str, Api], base: Any, style: str = "page") -> Office:
    """A world in which APIs are called by their canonical names."""
    paging = Paging(style=style)
    params = {
        name: {p.name: p for p in (*api.params, *(paging.params if api.paged else ()))}
        for name, api in apis.items()
    }
    same = {name: name for name in apis}
    everywhere = {name.partition(".")[0]: paging for name in apis}
    dialect = Dialect(routes=same, shown=same, params=params, paging=everywhere)
    return Office(world=World(base), apps=APPS, apis=apis, dialect=dialect, page_size=6)


@pytest.fixture
def office() -> Office:
    return office_of(plain(dict(APIS)), generate(0, 120))


def value_for(f: Field, office: Office, rng: Random) -> Any:
    """A value that the field takes."""
    people = [row for _, row in office.world.rows("contacts")]
    if f.choices:
        return rng.choice(f.choices)
    if f.refers in ("email", "phone"):
        some: Any = rng.choice(people)[f.refers]
        return [some] if f.kind == "strs" else some
    if f.refers:
        ids = [i for i, _ in office.world.rows(f.refers)]
        return [rng.choice(ids)] if f.kind == "ints" else rng.choice(ids)
    low, high = max(f.low, 1), min(f.high, 50)
    fixed = {"int": rng.randint(low, max(low, high)), "bool": True, "day": "2031-12-24"}
    fixed |= {"clock": "23:45", "strs": ["mon"], "ints": []}
    return fixed.get(f.kind, f"new {rng.randint(1000, 9999)}")


@pytest.mark.parametrize("table", CREATED)
def test_rows_live_from_create_to_delete(table: str, office: Office) -> None:
    r, app, rng = RESOURCES[table], APP_OF[table], Random(table)
    given = {f.name: value_for(f, office, rng) for f in r.fields if f.given != "never"}
    given |= {"start": "08:00", "end": "09:00"} if table == "events" else {}
    given |= {"locked": False} if table == "files" else {}
    given |= {"notebook_id": open_notebook(office)} if table == "notes" else {}
    given |= {"report_id": 0} if table == "receipts" else {}
    made = invoke(office, f"{app}.create_{r.name}", given)["id"]
    shown = invoke(office, f"{app}.show_{r.name}", {r.id_param.name: made})
    assert {k: shown[k] for k in given} == given and shown["id"] == made
    assert set(shown) == {"id", *(f.name for f in r.fields)}
    listed = everything(office, f"{app}.list_{r.plural}")
    assert [row for row in listed if row["id"] == made]
    if "update" in r.verbs:
        name = next(
            f.name
            for f in r.fields
            if f.given == "always" and f.kind in ("str", "int", "day", "bool")
        )
        f = next(f for f in r.fields if f.name == name)
        new = False if f.kind == "bool" else value_for(f, office, Random(1))
        invoke(office, f"{app}.update_{r.name}", {r.id_param.name: made, name: new})
        again = invoke(office, f"{app}.show_{r.name}", {r.id_param.name: made})
        assert again == {**shown, name: new}
        with pytest.raises(ApiError, match="nothing to change"):
            invoke(office, f"{app}.update_{r.name}", {r.id_param.name: made})
    if "delete" in r.verbs:
        invoke(office, f"{app}.delete_{r.name}", {r.id_param.name: made})
        assert not office.world.diff().added and not office.world.diff().removed
        for verb in ("show", "delete"):
            with pytest.raises(ApiError, match=r"no .* with id") as error:
                invoke(office, f"{app}.{verb}_{r.name}", {r.id_param.name: made})
            assert error.value.category == "not_found"


def open_notebook(office: Office) -> int:
    return next(i for i, _ in office.world.rows("notebooks", locked=False))


def everything(office: Office, name: str, **filters: Any) -> list[dict[str, Any]]:
    """All pages of a list."""
    found: list[dict[str, Any]] = []
    page: int | None = 1
    while page is not None:
        answer = invoke(office, name, {**filters, "page": page})
        found += answer["items"]
        page = answer["next_page"]
    return found


@pytest.mark.parametrize("table", [t for t, r in RESOURCES.items() if "list" in r.verbs])
def test_lists_filter_sort_and_count(table: str, office: Office) -> None:
    r, app = RESOURCES[table], APP_OF[table]
    rows = list(office.world.rows(table))
    name = f"{app}.list_{r.plural}"
    assert [row["id"] for row in everything(office, name)] == [i for i, _ in rows]
    for f in r.fields:
        if f.filters and rows:
            value = rows[0][1][f.name]
            wanted = [i for i, row in rows if row[f.name] == value]
            assert [row["id"] for row in everything(office, name, **{f.name: value})] == wanted
            if "count" in r.verbs:
                count = invoke(office, f"{app}.count_{r.plural}", {f.name: value})
                assert count == {"count": len(wanted)}
        if f.listed and f.kind not in ("ints", "strs", "bool"):
            downwards = [row[f.name] for row in everything(office, name, sort_by=f"-{f.name}")]
            assert downwards == sorted(downwards, reverse=True)
    if r.dated and rows:
        middle = str(sorted(str(row[r.dated]) for _, row in rows)[len(rows) // 2])
        late = {row["id"] for row in everything(office, name, after=middle)}
        early = {row["id"] for row in everything(office, name, before=middle)}
        assert late | early == {i for i, _ in rows}
        assert late & early == {i for i, row in rows if row[r.dated] == middle}


@pytest.mark.parametrize("table", [t for t, r in RESOURCES.items() if "search" in r.verbs])
def test_searches_find_by_part_of_a_text(table: str, office: Office) -> None:
    r, app = RESOURCES[table], APP_OF[table]
    for row_id, row in list(office.world.rows(table))[:3]:
        column = (r.search or tuple(f.name for f in r.fields if f.kind == "str" and not f.choices))[
            0
        ]
        query = str(row[column])[:-1].upper()
        found = everything(office, f"{app}.search_{r.plural}", query=query)
        assert row_id in [row["id"] for row in found]
    assert not everything(office, f"{app}.search_{r.plural}", query="no such text anywhere")


@pytest.mark.parametrize("table", [t for t, r in RESOURCES.items() if r.flags])
def test_flags_are_set_once(table: str, office: Office) -> None:
    r, app = RESOURCES[table], APP_OF[table]
    row_id, row = next(iter(office.world.rows(table)))
    for name, verbs in r.flags.items():
        on, off = verbs if not row[name] else verbs[::-1]
        invoke(office, f"{app}.{on}_{r.name}", {r.id_param.name: row_id})
        assert office.world.diff().changed[table, row_id] == {name: not row[name]}
        with pytest.raises(ApiError, match="already"):
            invoke(office, f"{app}.{on}_{r.name}", {r.id_param.name: row_id})
        invoke(office, f"{app}.{off}_{r.name}", {r.id_param.name: row_id})
        assert not office.world.diff().changed


@pytest.mark.parametrize("style", ["page", "offset", "cursor"])
def test_every_way_of_paging_covers_the_list(style: str) -> None:
    office = office_of(plain(dict(APIS)), generate(0, 120), style)
    wanted = [i for i, _ in office.world.rows("emails")]
    paging, seen, page = Paging(style=style), list[int](), 1
    while True:
        answer = invoke(office, "mail.list_emails", paging.arguments(page, 6))
        seen += [row["id"] for row in answer["items"]]
        more = answer["total"] > len(seen) if style == "offset" else next(
            v for k, v in answer.items() if k.startswith("next")
        )  # fmt: skip
        if not more:
            break
        page += 1
    assert seen == wanted
    bad = {"page": {"page": 0}, "offset": {"offset": -1}, "cursor": {"cursor": "after-x"}}[style]
    with pytest.raises(ApiError) as error:
        invoke(office, "mail.list_emails", bad)
    assert error.value.category == "invalid_value"


def test_money_is_never_made_or_lost(office: Office) -> None:
    """Wallet, cards and pots together change by what is sent, and by nothing else."""

    def wealth() -> int:
        rows: Any = [row for t in ("wallet", "cards", "pots") for _, row in office.world.rows(t)]
        return sum(
            row.get("balance", 0) + row.get("money", 0) + row.get("saved", 0) for row in rows
        )

    rng, start, sent = Random(0), wealth(), 0
    cards = [i for i, _ in office.world.rows("cards")]
    pots = [i for i, _ in office.world.rows("pots")]
    person = next(office.world.rows("contacts"))[1]
    for _ in range(300):
        amount = rng.randint(1, 400)
        name, given = rng.choice([
            ("top_up", {"card_id": rng.choice(cards)}),
            ("withdraw", {"card_id": rng.choice(cards)}),
            ("save_into_pot", {"pot_id": rng.choice(pots)}),
            ("take_from_pot", {"pot_id": rng.choice(pots)}),
            ("send_money", {"email": person["email"]}),
        ])  # fmt: skip
        try:
            invoke(office, f"payments.{name}", {**given, "amount": amount})
            sent += amount if name == "send_money" else 0
        except ApiError as error:
            assert error.category == "insufficient_funds"
        assert wealth() == start - sent


def test_snapshots_bring_a_world_back(office: Office) -> None:
    invoke(
        office,
        "vault.create_address",
        {"kind": "other", "street": "x", "city": "y", "zip_code": "z"},
    )
    before, diff = office.world.snapshot(), office.world.diff()
    row_id = next(office.world.rows("addresses"))[0]
    invoke(office, "vault.delete_address", {"address_id": row_id})
    assert office.world.diff() != diff
    office.world.restore(before)
    assert office.world.diff() == diff
    other = World(generate(0, 120))
    other.restore(before)
    assert other.diff() == diff and other.next_id("addresses") == office.world.next_id("addresses")


PLANT = Resource(
    name="plant", plural="plants", table="plants", doc="a plant",
    fields=(
        text("name", "what it is called"),
        number("water_ml", "each time", low=10, high=2000),
        clock("at", "when it is watered", default="08:00"),
        many("helpers", "email addresses", "email"),
        flag("indoors", "whether it stands inside"),
        text("state", "how it is", default="fine", given="never"),
    ),
    flags={"indoors": ("carry_in", "carry_out")},
    members={"helpers": ("add_helper_to_plant", "remove_helper_from_plant", "email")},
    moves=(Move(verb="repot", field="state", to="repotted", source=("fine",)),),
)  # fmt: skip
LEAF = Resource(
    name="leaf", plural="leaves", table="leaves", doc="a leaf",
    fields=(
        ref("plant_id", "plants", "id of the plant"),
        text("color", "its color", default="green"),
    ),
)  # fmt: skip


def water_all(office: Office) -> Any:
    """Millilitres for all plants."""
    amounts: Any = [row["water_ml"] for _, row in office.world.rows("plants")]
    return {"water_ml": sum(amounts)}


def seed_plants(s: Seeding) -> None:
    """Twenty plants."""
    s.fill("plants", ({"name": f"Fern {i}", "water_ml": 10 + i} for i in range(20)))


GARDEN = OfficeApp(
    name="garden", doc="Your plants.", resources=(PLANT, LEAF), seed=seed_plants,
    apis=(Api(name="water_all", doc="How much water all plants need.", handler=water_all),),
)  # fmt: skip


def garden() -> Iterator[Office]:
    tables: dict[str, dict[int, Any]] = {k: dict(v) for k, v in generate(0, 120).items()}
    resources = {r.table: r for r in GARDEN.resources}
    tables |= {"plants": {}, "leaves": {}}
    account = {"app": "garden", "username": "me", "password": "secret-password"}
    tables["accounts"][99] = account
    seed_plants(Seeding(Random(0), tables["profile"][1], tables, resources))
    app = GARDEN.build()
    apis = table_of([app])
    for number_of_dialect in range(6):
        dialect = draw_dialect(number_of_dialect, apis, frozenset())
        yield Office(
            world=World(tables), apps={"garden": app}, apis=apis, dialect=dialect, page_size=6
        )


def test_a_new_app_is_one_declaration() -> None:
    """Login, documentation, dialects, paging, CRUD, flags, members, moves: from the declaration."""
    for office in garden():

        def call(api: str, office: Office = office, **given: Any) -> Any:
            name = f"garden.{api}"
            names = office.dialect.names(name)
            token = (
                {} if office.apis[name].public else {"access_token": next(iter(office.tokens), "")}
            )
            arguments = {names[k]: v for k, v in {**given, **token}.items()}
            return invoke(office, office.dialect.shown[name], arguments)

        with pytest.raises(ApiError) as error:
            call("water_all")
        assert error.value.category == "unauthorized"
        call("login", username="me", password="secret-password")
        assert call("water_all") == {"water_ml": sum(range(10, 30))}
        assert len(call("list_plants")["items"]) == 6
        person = next(office.world.rows("contacts"))[1]
        made = call("create_plant", name="Moss", water_ml=50)["id"]
        call("carry_in_plant", plant_id=made)
        call("add_helper_to_plant", plant_id=made, email=person["email"])
        call("repot_plant", plant_id=made)
        call("create_leaf", plant_id=made)
        shown = call("show_plant", plant_id=made)
        assert shown == {
            "id": made, "name": "Moss", "water_ml": 50, "at": "08:00", "helpers": [person["email"]],
            "indoors": True, "state": "repotted",
        }  # fmt: skip
        for api, given, category in (
            ("repot_plant", {"plant_id": made}, "conflict"),
            ("create_leaf", {"plant_id": 10**6}, "not_found"),
            ("create_plant", {"name": "x", "water_ml": 5}, "invalid_value"),
            ("create_plant", {"name": "x", "water_ml": 50, "at": "24:00"}, "invalid_value"),
            ("add_helper_to_plant", {"plant_id": made, "email": "no@body"}, "not_found"),
            ("add_helper_to_plant", {"plant_id": made, "email": person["email"]}, "conflict"),
        ):
            with pytest.raises(ApiError) as error:
                call(api, **given)
            assert error.value.category == category, api


def test_declarations_hold_together() -> None:
    """References point to tables, searched and flagged columns exist, names are used once."""
    for table, r in RESOURCES.items():
        columns = {f.name: f for f in r.fields}
        assert len(columns) == len(r.fields), table
        for name in (*r.search, *r.flags, *r.members, *(m.field for m in r.moves)):
            assert name in columns, (table, name)
        assert not r.dated or columns[r.dated].kind == "day"
        for f in r.fields:
            assert f.refers in ("", "email", "phone") or f.refers in RESOURCES, (table, f.name)
    for app in APPS.values():
        names = [api.name for api in app.apis]
        assert len(set(names)) == len(names), app.name
    assert {app.name for app in DECLARED.values()} == set(APPS)
