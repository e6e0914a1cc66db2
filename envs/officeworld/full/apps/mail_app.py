"""Email: folders, labels, drafts, filter rules, signatures."""

from typing import Any

from loopwright.envs.officeworld.api import LONG_TEXT_CHARS, Api, ApiError, Office, Param
from loopwright.envs.officeworld.columns import ME, TODAY, Move, choice, day, flag, many, text
from loopwright.envs.officeworld.full.declare import OfficeApp, Seeding
from loopwright.envs.officeworld.resources import Resource
from loopwright.envs.officeworld.state import Row, Value

FOLDERS = ("inbox", "archive", "sent", "spam", "trash")
EMAIL = Resource(
    name="email",
    plural="emails",
    table="emails",
    doc="an email",
    verbs=("list", "search", "show", "delete", "count"),
    fields=(
        choice("folder", "where it lies", FOLDERS, default="sent", given="never"),
        text("sender", "email address of who wrote it", default=ME, filters=True, given="never"),
        many("recipients", "email addresses", "email"),
        text("subject", "what it is about"),
        text("body", "what it says", listed=False),
        day("date", "when it was sent", default=TODAY, given="never"),
        flag("read", "whether you have read it", default=True),
        flag("starred", "whether it has a star"),
        many("labels", "ids of labels", "labels", listed=False),
        many("files", "ids of attached files", "files", listed=False),
    ),
    dated="date",
    search=("subject", "body", "sender"),
    flags={"read": ("mark_read", "mark_unread"), "starred": ("star", "unstar")},
    members={"labels": ("add_label_to_email", "remove_label_from_email", "label_id")},
    moves=(
        Move(verb="archive", field="folder", to="archive", source=("inbox",)),
        Move(verb="trash", field="folder", to="trash"),
        Move(verb="mark_spam", field="folder", to="spam", source=("inbox",)),
        Move(verb="restore", field="folder", to="inbox", source=("archive", "spam", "trash")),
    ),
)
DRAFT = Resource(
    name="draft",
    plural="drafts",
    table="drafts",
    doc="an email not sent yet",
    fields=(
        many("recipients", "email addresses", "email"),
        text("subject", "what it is about"),
        text("body", "what it says", listed=False),
        many("files", "ids of files to attach", "files", listed=False),
    ),
    members={"files": ("attach_file_to_draft", "detach_file_from_draft", "file_id")},
)
LABEL = Resource(
    name="label",
    plural="labels",
    table="labels",
    doc="a label for emails",
    fields=(
        text("name", "name of the label"),
        choice("color", "its color", ("red", "green", "blue", "gray"), default="gray"),
    ),
)
RULE = Resource(
    name="rule",
    plural="rules",
    table="mail_rules",
    doc="a rule for incoming emails",
    fields=(
        text("sender", "email address it looks for", refers="email"),
        choice("folder", "where it puts the email", ("archive", "spam", "trash")),
        flag("enabled", "whether it is applied", default=True),
    ),
    flags={"enabled": ("enable", "disable")},
)
SIGNATURE = Resource(
    name="signature",
    plural="signatures",
    table="signatures",
    doc="a text below emails",
    verbs=("list", "show", "create", "update", "delete"),
    fields=(text("name", "name of the signature"), text("body", "its text")),
)


def send_email(
    office: Office,
    recipients: tuple[str, ...],
    subject: str,
    body: str,
    files: tuple[int, ...] = (),
) -> Any:
    """Send a new email."""
    if not recipients:
        raise ApiError("invalid_value", "an email needs a recipient", name="recipients")
    given: dict[str, Value] = {
        "recipients": recipients,
        "subject": subject,
        "body": body,
        "files": files,
    }
    return {"id": EMAIL.add(office, given)}


def reply_to_email(office: Office, email_id: int, body: str) -> Any:
    """Answer the sender of an email."""
    first = EMAIL.row(office, email_id)
    subject = str(first["subject"])
    subject = subject if subject.startswith("Re: ") else f"Re: {subject}"
    return send_email(office, (str(first["sender"]),), subject, body)


def forward_email(office: Office, email_id: int, recipients: tuple[str, ...]) -> Any:
    """Send an email on, with its text and files."""
    first = EMAIL.row(office, email_id)
    files: Any = first["files"]
    return send_email(office, recipients, f"Fwd: {first['subject']}", str(first["body"]), files)


def send_draft(office: Office, draft_id: int) -> Any:
    """Send a draft; it is a draft no longer."""
    draft: Any = DRAFT.row(office, draft_id)
    sent = send_email(office, draft["recipients"], draft["subject"], draft["body"], draft["files"])
    office.world.remove("drafts", draft_id)
    return sent


def show_folder_sizes(office: Office) -> Any:
    """Emails and unread ones per folder."""
    rows: list[Row] = [row for _, row in office.world.rows("emails")]
    return [
        {
            "folder": folder,
            "emails": sum(r["folder"] == folder for r in rows),
            "unread": sum(r["folder"] == folder and not r["read"] for r in rows),
        }
        for folder in FOLDERS
    ]


SUBJECTS = (
    (
        "Minutes of the planning round",
        "Attached are the decisions we took. Please read section two.",
    ),
    ("Your subscription renews soon", "Nothing to do on your side; the fee stays the same."),
    ("Parking garage closed", "The lower deck is closed for repairs until further notice."),
    ("Photos from the weekend", "I put the best ones into the shared folder. What a view!"),
    ("Question about the draft", "Could you look at the second paragraph when you find time?"),
    ("Invitation to the open studio", "We open our doors on Saturday. Bring whoever you like."),
    ("Broken coffee machine", "The machine on floor three is out of order again."),
    ("Reading list", "These are the chapters for next time, the third is optional."),
    ("Change of the delivery window", "The parcel arrives between ten and noon instead."),
    ("Ideas for the garden", "Lavender along the fence, maybe a bench below the pear tree?"),
    ("Budget figures", "The totals are final now, the travel line went down a little."),
    ("Lost umbrella", "Somebody left a green umbrella in the meeting room."),
    ("Rehearsal plan", "Strings at six, everybody at seven. Please be on time."),
    ("Price list for spring", "Prices are unchanged, apart from the small boxes."),
)


def seed(s: Seeding) -> None:
    """A hundred and fifty emails in all folders, labels, drafts, rules."""
    me = str(s.profile["email"])
    labels = s.fill("labels", [{"name": n} for n in ("Receipts", "Family", "Urgent", "Reading")])
    weights = {"inbox": 60, "archive": 40, "sent": 30, "spam": 12, "trash": 8}
    folders = [folder for folder, count in weights.items() for _ in range(count)]
    s.rng.shuffle(folders)
    rows: list[Row] = []
    for folder in folders:
        subject, body = s.rng.choice(SUBJECTS)
        other = str(s.rng.choice(s.people)["email"])
        mine = folder == "sent"
        rows.append(
            {
                "folder": folder,
                "sender": me if mine else other,
                "recipients": (other,) if mine else (me,),
                "subject": subject,
                "body": body,
                "date": s.day(-120, 0),
                "read": mine or s.rng.random() < 0.6,
                "starred": s.rng.random() < 0.15,
                "labels": tuple(s.rng.sample(labels, s.rng.choice((0, 0, 0, 1)))),
            }
        )
    s.fill("emails", sorted(rows, key=lambda row: str(row["date"])))
    s.fill(
        "drafts",
        (
            {
                "recipients": (str(s.rng.choice(s.people)["email"]),),
                "subject": subject,
                "body": body,
            }
            for subject, body in s.rng.sample(SUBJECTS, 5)
        ),
    )
    senders = s.rng.sample(s.people, 4)
    s.fill(
        "mail_rules",
        (
            {
                "sender": p["email"],
                "folder": s.rng.choice(("archive", "spam")),
                "enabled": i % 2 == 0,
            }
            for i, p in enumerate(senders)
        ),
    )
    s.fill("signatures", [{"name": "formal", "body": f"Kind regards\n{s.profile['name']}"}])


RECIPIENTS = Param(name="recipients", kind="strs", doc="email addresses of people you know")
BODY = Param(name="body", kind="str", doc="what it says", max_chars=LONG_TEXT_CHARS)
APP = OfficeApp(
    name="mail",
    doc="Email: folders, labels, drafts, filter rules, signatures.",
    resources=(EMAIL, DRAFT, LABEL, RULE, SIGNATURE),
    seed=seed,
    apis=(
        Api(
            name="send_email",
            doc="Send a new email.",
            handler=send_email,
            writes=True,
            returns="id",
            params=(
                RECIPIENTS,
                Param(name="subject", kind="str", doc="what it is about"),
                BODY,
                Param(name="files", kind="ints", doc="ids of files to attach", default=()),
            ),
        ),
        Api(
            name="reply_to_email",
            doc="Answer the sender of an email; the subject gets a Re:.",
            params=(EMAIL.id_param, BODY),
            handler=reply_to_email,
            writes=True,
            returns="id",
        ),
        Api(
            name="forward_email",
            doc="Send an email on, with its text and files, under Fwd:.",
            params=(EMAIL.id_param, RECIPIENTS),
            handler=forward_email,
            writes=True,
            returns="id",
        ),
        Api(
            name="send_draft",
            doc="Send a draft; it is a draft no longer.",
            params=(DRAFT.id_param,),
            handler=send_draft,
            writes=True,
            returns="id",
        ),
        Api(
            name="show_folder_sizes",
            doc="Emails and unread ones per folder.",
            handler=show_folder_sizes,
        ),
    ),
)
