"""How the oracle of the full world works: it reads the documentation of what it will call, fetches
passwords, logs in, and makes the plan's calls in the dialect of the world."""

from collections.abc import Iterator
from typing import Any

from loopwright.envs.actions import Call
from loopwright.envs.officeworld.api import Office
from loopwright.envs.officeworld.edition import OracleCall
from loopwright.envs.officeworld.full.declare import account_of, token_for
from loopwright.envs.officeworld.scenario import Plan


class TokenOf(str):
    """An access token that code writes as the variable its login was kept in."""

    __slots__ = ("app",)
    app: str

    def __new__(cls, token: str, app: str) -> "TokenOf":
        """The token `token` of `app`."""
        made = super().__new__(cls, token)
        made.app = app
        return made


def solve(plan: Plan, office: Office) -> list[OracleCall]:
    """Everything from the first look-up to `done`."""
    calls = [call for call in plan.calls if call.name != "done"]
    used = list(dict.fromkeys(call.name for call in calls))
    apps = list(dict.fromkeys(name.partition(".")[0] for name in used))
    logins = [app for app in apps if f"{app}.login" in office.apis]
    found = [*_read(office, apps, used)]
    for app in logins:
        call = Call(name="vault.show_password", arguments={"app": app})
        found.append(OracleCall(call=call, phase="password"))
    for app in logins:
        _, row = account_of(office, app)
        given = {"username": row["username"], "password": row["password"]}
        call = Call(name=f"{app}.login", arguments=given)
        found.append(OracleCall(call=call, phase="login", token_of=app))
    for call in calls:
        phase = "write" if office.apis[call.name].writes else "read"
        found.append(OracleCall(call=translated(call, office), phase=phase))
    given = {} if plan.goal.answer is None else {"answer": plan.goal.answer}
    found.append(OracleCall(call=Call(name="done", arguments=given), phase="write"))
    return found


def _read(office: Office, apps: list[str], used: list[str]) -> Iterator[OracleCall]:
    yield OracleCall(call=Call(name="docs.show_app_descriptions"), phase="docs")
    for app in apps:
        call = Call(name="docs.show_api_descriptions", arguments={"app": app})
        yield OracleCall(call=call, phase="docs")
    for name in used:
        app, _, api = office.dialect.shown[name].partition(".")
        call = Call(name="docs.show_api_doc", arguments={"app": app, "api": api})
        yield OracleCall(call=call, phase="docs")


def translated(call: Call, office: Office) -> Call:
    """A canonical call in the dialect of the world, with its access token; `page` becomes whatever
    the app pages by."""
    api, app = office.apis[call.name], call.name.partition(".")[0]
    given: dict[str, Any] = dict(call.arguments)
    if api.paged:
        paging = office.dialect.paging[app]
        given |= paging.arguments(given.pop("page", 1), office.page_size)
    names = office.dialect.names(call.name)
    arguments = {names[k]: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    if not api.public:
        arguments[names["access_token"]] = TokenOf(token_for(office, app), app)
    return Call(name=office.dialect.shown[call.name], arguments=arguments)
