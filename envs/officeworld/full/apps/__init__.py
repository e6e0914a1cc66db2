"""The apps of the full world: every module here that has an `APP`."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping

from loopwright.envs.officeworld.api import Api, App, table_of
from loopwright.envs.officeworld.full.declare import OfficeApp
from loopwright.envs.officeworld.resources import Resource


def _found() -> Iterator[OfficeApp]:
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        app = importlib.import_module(f"{__name__}.{module.name}").APP
        assert isinstance(app, OfficeApp), f"{module.name}.APP is no OfficeApp"
        yield app


DECLARED: Mapping[str, OfficeApp] = {app.name: app for app in _found()}
APPS: Mapping[str, App] = {name: app.build() for name, app in DECLARED.items()}
APIS: Mapping[str, Api] = table_of(APPS.values())
TRAINING_APPS: Mapping[str, App] = {n: a for n, a in APPS.items() if not DECLARED[n].held_out}
RESOURCES: Mapping[str, Resource] = {r.table: r for a in DECLARED.values() for r in a.resources}
"""table → what declares it"""
APP_OF: Mapping[str, str] = {r.table: a.name for a in DECLARED.values() for r in a.resources}
"""table → the app it belongs to"""
