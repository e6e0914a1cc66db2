"""Projects, tasks with subtasks, comments, sections."""

from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, Office, Param
from loopwright.envs.officeworld.columns import (
    ME,
    TODAY,
    Move,
    choice,
    day,
    flag,
    many,
    number,
    ref,
    text,
)
from loopwright.envs.officeworld.full.declare import OfficeApp, Seeding
from loopwright.envs.officeworld.resources import Resource
from loopwright.envs.officeworld.state import Row

PROJECT = Resource(
    name="project",
    plural="projects",
    table="projects",
    doc="a project",
    fields=(
        text("name", "its name"),
        text("about", "what it is about", default="", listed=False),
        many("members", "email addresses of who works on it", "email", listed=False),
        choice(
            "state", "whether it goes on", ("active", "archived"), default="active", given="never"
        ),
    ),
    members={"members": ("add_member_to_project", "remove_member_from_project", "email")},
    moves=(
        Move(verb="archive", field="state", to="archived"),
        Move(verb="reactivate", field="state", to="active"),
    ),
)
TASK = Resource(
    name="task",
    plural="tasks",
    table="tasks",
    doc="a task of a project",
    fields=(
        text("title", "what is to be done"),
        ref("project_id", "projects", "id of its project"),
        text("assignee", "email address of who does it", default=ME, refers="email", filters=True),
        day("due", "until when"),
        choice("priority", "how urgent", ("low", "normal", "high"), default="normal"),
        choice("state", "how far it is", ("open", "doing", "done"), default="open", given="never"),
        text("details", "more about it", default="", listed=False),
        number("hours", "estimated work", default=1, low=0, high=500),
        flag("starred", "whether it has a star", listed=False),
    ),
    dated="due",
    flags={"starred": ("star", "unstar")},
    moves=(
        Move(verb="begin", field="state", to="doing", source=("open",)),
        Move(verb="complete", field="state", to="done", source=("open", "doing")),
        Move(verb="reopen", field="state", to="open", source=("done",)),
    ),
)
SUBTASK = Resource(
    name="subtask",
    plural="subtasks",
    table="subtasks",
    doc="a step of a task",
    fields=(
        ref("task_id", "tasks", "id of its task"),
        text("title", "what is to be done"),
        flag("done", "whether it is done"),
    ),
    flags={"done": ("check", "uncheck")},
)
COMMENT = Resource(
    name="comment",
    plural="comments",
    table="comments",
    doc="a comment on a task",
    fields=(
        ref("task_id", "tasks", "id of its task", given="create"),
        text("author", "email address of who wrote it", default=ME, filters=True, given="never"),
        text("text", "what it says"),
        day("date", "when", default=TODAY, given="never"),
    ),
    guard=lambda office, row: own(office, row),
)


def own(office: Office, row: Row) -> None:
    """Only the author changes a comment."""
    if row["author"] != office.profile["email"]:
        raise ApiError("forbidden", "only its author may change a comment")


def assign_task(office: Office, task_id: int, assignee: str) -> None:
    """Give a task to somebody."""
    TASK.put(office, task_id, {"assignee": assignee})


def postpone_task(office: Office, task_id: int, due: str) -> None:
    """A later due date."""
    if due <= str(TASK.row(office, task_id)["due"]):
        raise ApiError("invalid_value", "the new date must be later", name="due")
    TASK.put(office, task_id, {"due": due})


def show_workload(office: Office) -> Any:
    """Open tasks and hours per person."""
    load: dict[str, list[int]] = {}
    for _, row in office.world.rows("tasks"):
        if row["state"] != "done":
            hours: Any = row["hours"]
            load.setdefault(str(row["assignee"]), []).append(hours)
    return [{"assignee": a, "tasks": len(h), "hours": sum(h)} for a, h in sorted(load.items())]


PROJECTS = (
    "Website relaunch",
    "Kitchen renovation",
    "Annual report",
    "Trade fair",
    "Summer party",
    "Data cleanup",
    "Hiring round",
)
VERBS = (
    "Draft",
    "Review",
    "Order",
    "Call about",
    "Measure",
    "Translate",
    "Print",
    "Test",
    "Plan",
    "Compare",
)
THINGS = (
    "the cover page",
    "the tiles",
    "the supplier list",
    "the floor plan",
    "the contact form",
    "the invitations",
    "the price table",
    "the banner",
    "the backup",
    "the interview guide",
    "the opening speech",
    "the lamps",
)


def seed(s: Seeding) -> None:
    """Seven projects, about a hundred tasks of different titles within a project."""
    me = str(s.profile["email"])
    tasks: list[Row] = []
    for name in PROJECTS:
        crew = [str(p["email"]) for p in s.rng.sample(s.people, 5)]
        (project,) = s.fill("projects", [{"name": name, "members": tuple(crew)}])
        titles = s.rng.sample([f"{v} {t}" for v in VERBS for t in THINGS], 15)
        tasks += [
            {
                "title": title,
                "project_id": project,
                "assignee": s.rng.choice((*crew, me, me)),
                "due": s.day(-20, 40),
                "priority": s.rng.choice(("low", "normal", "high")),
                "state": s.rng.choice(("open", "open", "doing", "done")),
                "hours": s.rng.randint(1, 16),
                "starred": s.rng.random() < 0.1,
            }
            for title in titles
        ]
    ids = s.fill("tasks", tasks)
    s.fill(
        "subtasks",
        (
            {
                "task_id": s.rng.choice(ids),
                "title": f"{s.rng.choice(VERBS)} {s.rng.choice(THINGS)}",
                "done": s.rng.random() < 0.4,
            }
            for _ in range(60)
        ),
    )
    s.fill(
        "comments",
        (
            {
                "task_id": s.rng.choice(ids),
                "author": s.rng.choice([*s.people[:30], s.profile])["email"],
                "text": s.rng.choice(
                    ("Looks good.", "Who can help?", "Waiting for an answer.", "Done by noon.")
                ),
                "date": s.day(-30, 0),
            }
            for _ in range(50)
        ),
    )


APP = OfficeApp(
    name="tasks",
    doc="Projects, their tasks with subtasks, and comments.",
    resources=(PROJECT, TASK, SUBTASK, COMMENT),
    seed=seed,
    apis=(
        Api(
            name="assign_task",
            doc="Give a task to somebody.",
            handler=assign_task,
            writes=True,
            params=(TASK.id_param, Param(name="assignee", kind="str", doc="email address")),
        ),
        Api(
            name="postpone_task",
            doc="Give a task a later due date.",
            handler=postpone_task,
            writes=True,
            params=(TASK.id_param, Param(name="due", kind="day", doc="the new date")),
        ),
        Api(
            name="show_workload",
            doc="Tasks not done yet, and their hours, per person.",
            handler=show_workload,
        ),
    ),
)
