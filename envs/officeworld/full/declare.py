"""How an app of the full world is declared: resources, further APIs, and what lies in its tables at
the start. Its account (login, logout, …) comes by itself.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date, timedelta
from random import Random
from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, App, Office, Param
from loopwright.envs.officeworld.resources import Resource
from loopwright.envs.officeworld.state import Row, Value


class Seeding:
    """What an app's `seed` fills its tables with: the population, a stream of random numbers of its
    own, and the tables filled so far."""

    def __init__(
        self,
        rng: Random,
        profile: Row,
        tables: dict[str, dict[int, Row]],
        resources: Mapping[str, Resource],
    ) -> None:
        self.rng = rng
        self.profile = profile
        self.tables = tables
        self._resources = resources

    @property
    def people(self) -> list[Row]:
        """Everybody in the address book."""
        return list(self.tables["contacts"].values())

    def fill(self, table: str, rows: Iterable[Mapping[str, Value]]) -> list[int]:
        """Put rows into a table under new ids, with defaults where they leave fields out; the
        ids."""
        given = list(rows)
        first = 100 + self.rng.randrange(900)
        ids = [first + i for i in sorted(self.rng.sample(range(4 * len(given)), len(given)))]
        resource = self._resources.get(table)
        for row_id, row in zip(ids, given, strict=True):
            whole = resource.full_row(self.profile, row) if resource is not None else dict(row)
            self.tables.setdefault(table, {})[row_id] = whole
        return ids

    def day(self, low: int, high: int) -> str:
        """A date between `low` and `high` days after today."""
        return shifted(str(self.profile["today"]), self.rng.randint(low, high))

    def time(self, low: int = 8, high: int = 18) -> str:
        """A time of day, on a quarter of an hour."""
        return f"{self.rng.randint(low, high):02d}:{self.rng.choice((0, 15, 30, 45)):02d}"


def shifted(day: str, days: int) -> str:
    """The date `days` after `day`."""
    return (date.fromisoformat(day) + timedelta(days=days)).isoformat()


@dataclass(frozen=True, slots=True, kw_only=True)
class OfficeApp:
    """One app of the full world, as declared."""

    name: str
    doc: str
    resources: tuple[Resource, ...] = ()
    apis: tuple[Api, ...] = ()  # what no resource gives
    tables: tuple[str, ...] = ()  # further ones, without a resource
    seed: Callable[[Seeding], None] | None = None
    account: bool = True  # its APIs need a token from its login
    held_out: bool = False  # not there in training

    def build(self) -> App:
        """The table of its APIs."""
        public = not self.account
        apis = [replace(api, public=public) for api in self.apis]
        made = [api for resource in self.resources for api in resource.apis(public=public)]
        account = _account_apis(self.name) if self.account else ()
        return App(name=self.name, doc=self.doc, apis=(*account, *made, *apis))


def account_of(office: Office, app: str) -> tuple[int, Row]:
    """The user's account of an app."""
    return next(office.world.rows("accounts", app=app))


def token_for(office: Office, app: str) -> str:
    """The access token that a login to `app` gives."""
    _, row = account_of(office, app)
    whole = f"{row['username']}/{row['password']}/{app}"
    return f"{app}-{hashlib.sha256(whole.encode()).hexdigest()[:12]}"


USERNAME = Param(name="username", kind="str", doc="of your account; the vault knows it")
PASSWORD = Param(name="password", kind="str", doc="of your account; the vault knows it")


def _account_apis(app: str) -> Iterator[Api]:
    def login(office: Office, username: str, password: str) -> Any:
        _, row = account_of(office, app)
        if (username, password) != (row["username"], row["password"]):
            raise ApiError("unauthorized", "wrong username or password")
        token = token_for(office, app)
        office.tokens[token] = app
        return {"access_token": token}

    def logout(office: Office) -> None:
        office.tokens.pop(token_for(office, app), None)

    def show_account(office: Office) -> Any:
        _, row = account_of(office, app)
        return {"username": row["username"], "name": office.profile["name"]}

    def change_password(office: Office, password: str, new_password: str) -> None:
        row_id, row = account_of(office, app)
        if password != row["password"]:
            raise ApiError("unauthorized", "wrong password")
        if len(new_password) < 8:
            raise ApiError("invalid_value", "a password has 8 characters or more")
        office.tokens.pop(token_for(office, app), None)
        office.world.update("accounts", row_id, password=new_password)

    new = Param(name="new_password", kind="str", doc="8 to 60 characters", max_chars=60)
    yield Api(
        name="login",
        doc="Log in. Every other API of this app needs the access token.",
        params=(USERNAME, PASSWORD),
        handler=login,
        returns="access_token",
    )
    private = (
        Api(name="logout", doc="End the session; its token is no longer valid.", handler=logout),
        Api(
            name="show_account", doc="Your account.", handler=show_account, returns="username, name"
        ),
        Api(
            name="change_password",
            doc="Change your password; ends the session.",
            params=(PASSWORD, new),
            handler=change_password,
            writes=True,
        ),
    )
    for api in private:
        yield replace(api, public=False)
