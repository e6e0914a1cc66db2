"""The documentation of all apps, in the dialect of the world."""

from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, App, Office, Param
from loopwright.envs.officeworld.full.declare import OfficeApp


def _app(office: Office, name: str) -> App:
    found = office.apps.get(name)
    if found is None:
        raise ApiError("not_found", "no such app; see docs.show_app_descriptions")
    return found


def show_app_descriptions(office: Office) -> Any:
    """All apps, a line each."""
    return [{"app": app.name, "description": app.doc} for app in office.apps.values()]


def show_api_descriptions(office: Office, app: str) -> Any:
    """The APIs of an app, a line each."""
    return [
        {"api": _route(office, app, api), "description": api.doc} for api in _app(office, app).apis
    ]


def show_api_doc(office: Office, app: str, api: str) -> Any:
    """Everything about one API."""
    _app(office, app)
    canonical = office.dialect.routes.get(f"{app}.{api}")
    if canonical is None:
        raise ApiError("not_found", f"{app} has no such API; see docs.show_api_descriptions")
    found = office.apis[canonical]
    parameters = [
        {
            "name": label,
            "type": p.shown_kind,
            "required": p.required,
            "description": p.doc,
            **({} if p.required else {"default": p.default}),
            **({"one_of": list(p.choices)} if p.choices else {}),
        }
        for label, p in office.dialect.params[canonical].items()
    ]
    shown = {"api": f"{app}.{api}", "description": found.doc, "parameters": parameters}
    return {**shown, "returns": found.returns} if found.returns else shown


def search_apis(office: Office, query: str) -> Any:
    """APIs of any app whose name or description holds all the words."""
    words = query.casefold().split()
    return [
        {"api": f"{app.name}.{route}", "description": api.doc}
        for app in office.apps.values()
        for api in app.apis
        if (route := _route(office, app.name, api)) is not None
        and all(word in f"{app.name}.{route} {api.doc}".casefold() for word in words)
    ]


def _route(office: Office, app: str, api: Api) -> str:
    return office.dialect.shown[f"{app}.{api.name}"].partition(".")[2]


NAME = Param(name="app", kind="str", doc="name of the app")
APP = OfficeApp(
    name="docs",
    doc="Documentation of all apps: start here.",
    account=False,
    apis=(
        Api(
            name="show_app_descriptions",
            doc="All apps, a line each.",
            handler=show_app_descriptions,
        ),
        Api(
            name="show_api_descriptions",
            doc="The APIs of an app, a line each.",
            params=(NAME,),
            handler=show_api_descriptions,
        ),
        Api(
            name="show_api_doc",
            doc="Parameters and result of one API.",
            handler=show_api_doc,
            params=(NAME, Param(name="api", kind="str", doc="its name, without the app's")),
        ),
        Api(
            name="search_apis",
            doc="APIs of any app by words of their name or description.",
            params=(Param(name="query", kind="str", doc="one or more words"),),
            handler=search_apis,
            paged=True,
        ),
    ),
)
