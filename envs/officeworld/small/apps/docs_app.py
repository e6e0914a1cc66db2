"""The documentation of all apps, in the dialect of the world."""

from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, App, Office, Param


def apps(office: Office) -> Any:
    """All apps."""
    return [{"app": app.name, "doc": app.doc} for app in office.apps.values()]


def list_apis(office: Office, app: str) -> Any:
    """The APIs of an app."""
    found = office.apps.get(app)
    if found is None:
        raise ApiError("not_found", "no such app; see docs.apps")
    return [{"api": f"{app}.{api.name}", "doc": api.doc} for api in found.apis]


def show(office: Office, api: str) -> Any:
    """The document of one API: its parameters by the names of this world."""
    found = office.apis.get(api)
    if found is None:
        raise ApiError("not_found", "no such API; see docs.list")
    params = [
        {"name": label, "type": p.kind, "doc": p.doc}
        for label, p in office.dialect.params[api].items()
    ]
    return {"api": api, "doc": found.doc, "params": params}


APP = App(
    name="docs",
    doc="Documentation of all apps.",
    apis=(
        Api(name="apps", doc="All apps.", handler=apps),
        Api(
            name="list",
            doc="The APIs of an app.",
            params=(Param(name="app", kind="str", doc="name of the app"),),
            handler=list_apis,
        ),
        Api(
            name="show",
            doc="The parameters of one API.",
            params=(Param(name="api", kind="str", doc="for example payments.send"),),
            handler=show,
        ),
    ),
)
