"""The table of apps. An app is one module with an `APP`; adding it here is all it takes."""

from collections.abc import Mapping

from loopwright.envs.officeworld.api import Api, App, table_of
from loopwright.envs.officeworld.small.apps import (
    calendar_app,
    contacts_app,
    docs_app,
    messages_app,
    payments_app,
)

APPS: Mapping[str, App] = {
    app.name: app
    for app in (
        contacts_app.APP,
        payments_app.APP,
        messages_app.APP,
        calendar_app.APP,
        docs_app.APP,
    )
}
APIS: Mapping[str, Api] = table_of(APPS.values())
