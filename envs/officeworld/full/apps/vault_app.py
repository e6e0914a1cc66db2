"""The user's own data: profile, accounts with passwords, addresses. Needs no login: it is where
logins come from."""

from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, Office, Param
from loopwright.envs.officeworld.columns import choice, flag, text
from loopwright.envs.officeworld.full.declare import OfficeApp, Seeding
from loopwright.envs.officeworld.full.people import CITIES
from loopwright.envs.officeworld.resources import Resource


def show_profile(office: Office) -> Any:
    """Who the user is."""
    return dict(office.profile)


def list_accounts(office: Office) -> Any:
    """Apps the user has an account with."""
    found = office.world.rows("accounts")
    return [
        {"app": r["app"], "username": r["username"]} for _, r in found if r["app"] in office.apps
    ]


def show_password(office: Office, app: str) -> Any:
    """Username and password of one account."""
    for _, row in office.world.rows("accounts", app=app):
        return {"app": app, "username": row["username"], "password": row["password"]}
    raise ApiError("not_found", "no account with an app of this name", name=app)


ADDRESS = Resource(
    name="address",
    plural="addresses",
    table="addresses",
    doc="an address of yours",
    fields=(
        choice("kind", "what it is", ("home", "work", "holiday", "other")),
        text("street", "street and number"),
        text("city", "city"),
        text("zip_code", "postal code"),
        flag("default", "whether orders go there unless told otherwise"),
    ),
)


def seed(s: Seeding) -> None:
    """A home, a work place, a holiday address."""
    streets = s.rng.sample(("Fern Row", "Mill Lane", "Orchard Way", "Quay Street", "Hill Road"), 3)
    s.fill(
        "addresses",
        (
            {
                "kind": kind,
                "street": f"{street} {s.rng.randint(1, 90)}",
                "city": s.rng.choice(CITIES),
                "zip_code": str(s.rng.randint(10000, 99999)),
                "default": kind == "home",
            }
            for kind, street in zip(("home", "work", "holiday"), streets, strict=True)
        ),
    )


APP = OfficeApp(
    name="vault",
    doc="Your profile, your addresses, and the passwords of your accounts. Needs no login.",
    account=False,
    resources=(ADDRESS,),
    seed=seed,
    apis=(
        Api(
            name="show_profile",
            doc="Your name, email address, phone, city, and today's date.",
            handler=show_profile,
        ),
        Api(name="list_accounts", doc="Apps you have an account with.", handler=list_accounts),
        Api(
            name="show_password",
            doc="Username and password of your account with an app.",
            params=(Param(name="app", kind="str", doc="name of the app"),),
            handler=show_password,
        ),
    ),
)
