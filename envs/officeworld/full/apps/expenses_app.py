"""Expenses: receipts, reports, budgets, mileage. Held out of training."""

from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, Office
from loopwright.envs.officeworld.columns import Move, choice, day, flag, number, ref, text
from loopwright.envs.officeworld.full.declare import OfficeApp, Seeding
from loopwright.envs.officeworld.resources import Resource
from loopwright.envs.officeworld.state import Row

KINDS = ("meals", "travel", "hotel", "supplies", "training")


def editable(office: Office, row: Row) -> None:
    """Receipts of a report that was handed in stay as they are."""
    report = office.world.get("reports", int(str(row["report_id"])))
    if report is not None and report["state"] != "draft":
        raise ApiError("forbidden", f"its report is {report['state']}")


REPORT = Resource(
    name="report",
    plural="reports",
    table="reports",
    doc="an expense report",
    fields=(
        text("title", "its title"),
        choice(
            "state",
            "how far it is",
            ("draft", "submitted", "approved", "rejected"),
            default="draft",
            given="never",
        ),
        text("note", "for who reads it", default="", listed=False),
    ),
    moves=(
        Move(verb="submit", field="state", to="submitted", source=("draft", "rejected")),
        Move(verb="withdraw", field="state", to="draft", source=("submitted",)),
    ),
)
RECEIPT = Resource(
    name="receipt",
    plural="receipts",
    table="receipts",
    doc="a receipt",
    fields=(
        text("merchant", "who was paid"),
        number("amount", "whole coins", low=1),
        choice("kind", "what for", KINDS),
        day("date", "when"),
        ref("report_id", "reports", "id of its report; 0 for none", default=0),
        flag("personal", "whether it is not for the company"),
    ),
    dated="date",
    flags={"personal": ("mark_personal", "mark_business")},
    guard=editable,
)
BUDGET = Resource(
    name="budget",
    plural="budgets",
    table="budgets",
    doc="what you may spend on one kind of things a year",
    verbs=("list", "show", "update"),
    fields=(
        choice("kind", "what for", KINDS, given="never"),
        number("limit", "whole coins", low=0),
    ),
)
DRIVE = Resource(
    name="drive",
    plural="drives",
    table="drives",
    doc="a drive with your own car",
    fields=(
        text("purpose", "what for"),
        number("kilometers", "how far", low=1, high=3000),
        day("date", "when"),
        flag("round_trip", "whether you drove back too"),
    ),
    dated="date",
)


def show_report_total(office: Office, report_id: int) -> Any:
    """Coins of a report, by kind."""
    REPORT.row(office, report_id)
    totals: dict[str, int] = {}
    for _, row in office.world.rows("receipts", report_id=report_id):
        amount: Any = row["amount"]
        totals[str(row["kind"])] = totals.get(str(row["kind"]), 0) + amount
    return {"total": sum(totals.values()), "by_kind": totals}


def file_receipt(office: Office, receipt_id: int, report_id: int) -> None:
    """Put a receipt into a report."""
    if REPORT.row(office, report_id)["state"] != "draft":
        raise ApiError("forbidden", "only drafts take receipts")
    RECEIPT.put(office, receipt_id, {"report_id": report_id})


def unfile_receipt(office: Office, receipt_id: int) -> None:
    """Take a receipt out of its report."""
    if not RECEIPT.row(office, receipt_id)["report_id"]:
        raise ApiError("conflict", "it is in no report")
    RECEIPT.put(office, receipt_id, {"report_id": 0})


MERCHANTS = (
    "Cafe Lumen",
    "Metro Cabs",
    "Paper & Ink",
    "Grand Pier Hotel",
    "Railhouse",
    "Copy Corner",
    "Bistro Nord",
    "Skillforge",
)


def seed(s: Seeding) -> None:
    """Reports in all states, ninety receipts of different amounts, budgets, drives."""
    titles = (
        "Spring fair",
        "Client visit",
        "Workshop",
        "Team offsite",
        "Office supplies",
        "Conference week",
    )
    reports = s.fill(
        "reports",
        (
            {"title": t, "state": state}
            for t, state in zip(
                titles,
                ("draft", "draft", "submitted", "approved", "rejected", "submitted"),
                strict=True,
            )
        ),
    )
    s.fill(
        "receipts",
        sorted(
            (
                {
                    "merchant": s.rng.choice(MERCHANTS),
                    "amount": amount,
                    "kind": s.rng.choice(KINDS),
                    "date": s.day(-120, 0),
                    "report_id": s.rng.choice((0, *reports)),
                    "personal": s.rng.random() < 0.15,
                }
                for amount in s.rng.sample(range(5, 400), 90)
            ),
            key=lambda row: str(row["date"]),
        ),
    )
    s.fill("budgets", ({"kind": kind, "limit": s.rng.randint(5, 40) * 100} for kind in KINDS))
    s.fill(
        "drives",
        (
            {
                "purpose": p,
                "kilometers": s.rng.randint(8, 400),
                "date": s.day(-60, 0),
                "round_trip": s.rng.random() < 0.5,
            }
            for p in (
                "Visit of the print shop",
                "Trade fair",
                "Site inspection",
                "Delivery",
                "Airport",
                "Client lunch",
            )
        ),
    )


APP = OfficeApp(
    name="expenses",
    doc="Expenses: reports, receipts, budgets, drives.",
    held_out=True,
    resources=(REPORT, RECEIPT, BUDGET, DRIVE),
    seed=seed,
    apis=(
        Api(
            name="show_report_total",
            doc="Coins of a report, in all and by kind.",
            params=(REPORT.id_param,),
            handler=show_report_total,
            returns="total, by_kind",
        ),
        Api(
            name="file_receipt",
            doc="Put a receipt into a report that is a draft.",
            params=(RECEIPT.id_param, REPORT.id_param),
            handler=file_receipt,
            writes=True,
        ),
        Api(
            name="unfile_receipt",
            doc="Take a receipt out of its report.",
            params=(RECEIPT.id_param,),
            handler=unfile_receipt,
            writes=True,
        ),
    ),
)
