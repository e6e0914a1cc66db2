"""Tasks and projects, files, notes."""

from typing import Any

from loopwright.envs.officeworld.full.draw import Draw, call, plan
from loopwright.envs.officeworld.full.families import every, named, one, removes, sets
from loopwright.envs.officeworld.scenario import Plan, Scenario


def _new_task(draw: Draw) -> Plan:
    project_id, project = draw.pick("projects")
    title = draw.rng.choice(
        ("Count the chairs", "Write the minutes", "Find a sponsor", "Check the fuses")
    )
    due, priority = draw.day(3, 40), draw.rng.choice(("low", "high"))
    given = {"title": title, "project_id": project_id, "due": due, "priority": priority}
    return plan(
        {**given, "project": project["name"]},
        [*draw.search("projects", project["name"], project_id), call("tasks.create_task", **given)],
        added=[draw.row("tasks", **given)],
    )


def _hand_over(draw: Draw) -> Plan:
    assignee, rows = draw.pick_many(
        "tasks",
        "assignee",
        2,
        4,
        lambda t: t["state"] != "done" and t["assignee"] != draw.me["email"],
    )
    other = draw.person(lambda p: p["email"] != assignee)
    person = draw.by("email", assignee)
    return plan(
        {"name": person["name"], "other": other["name"]},
        [
            *draw.look_up(person),
            *draw.look_up(other),
            *draw.listing("tasks", assignee=assignee),
            *(call("tasks.assign_task", task_id=i, assignee=other["email"]) for i, _ in rows),
        ],
        changed=[("tasks", i, {"assignee": other["email"]}) for i, _ in rows],
    )


def _urgent(draw: Draw) -> Plan:
    me = draw.me["email"]
    project_id, rows = draw.pick_many(
        "tasks", "project_id", 2, 4,
        lambda t: t["assignee"] == me and t["state"] != "done" and t["priority"] != "low",
    )  # fmt: skip
    project: Any = draw.world.get("projects", project_id)
    return plan(
        {"project": project["name"]},
        [
            *draw.search("projects", project["name"], project_id),
            *draw.listing("tasks", project_id=project_id, assignee=me),
            *(call("tasks.complete_task", task_id=i) for i, _ in rows),
        ],
        changed=[("tasks", i, {"state": "done"}) for i, _ in rows],
    )


def _hours(draw: Draw) -> Plan:
    project_id, rows = draw.pick_many("tasks", "project_id", 3, 12, lambda t: t["state"] != "done")
    project: Any = draw.world.get("projects", project_id)
    return plan(
        {"project": project["name"]},
        [
            *draw.search("projects", project["name"], project_id),
            *draw.listing("tasks", project_id=project_id),
        ],
        answer=sum(row["hours"] for _, row in rows),
    )


def _comment(draw: Draw) -> Plan:
    titles = [row["title"] for _, row in draw.rows("tasks")]
    task_id, task = draw.pick("tasks", lambda t: titles.count(t["title"]) == 1)
    text = draw.rng.choice(
        ("I take this one.", "Blocked until Monday.", "Please see the new plan.")
    )
    return plan(
        {"title": task["title"], "text": text},
        [
            *draw.search("tasks", task["title"], task_id),
            call("tasks.create_comment", task_id=task_id, text=text),
        ],
        added=[draw.row("comments", task_id=task_id, text=text)],
    )


def _to_checklist(draw: Draw) -> Plan:
    project_id, rows = draw.pick_many(
        "tasks", "project_id", 2, 4, lambda t: t["priority"] == "high" and t["state"] == "open"
    )
    project: Any = draw.world.get("projects", project_id)
    made = draw.world.next_id("checklists")
    items = [{"checklist_id": made, "text": row["title"]} for _, row in rows]
    return plan(
        {"project": project["name"]},
        [
            *draw.search("projects", project["name"], project_id),
            *draw.listing("tasks", project_id=project_id, priority="high", state="open"),
            call("notes.create_checklist", title=project["name"]),
            *(call("notes.create_item", **item) for item in items),
        ],
        added=[
            draw.row("checklists", title=project["name"]),
            *(draw.row("check_items", **item) for item in items),
        ],
    )


def _share(draw: Draw) -> Plan:
    file_id, file = draw.pick("files", lambda f: not f["locked"])
    person = draw.relative()
    return plan(
        {"file": file["name"], "relation": person["relation"]},
        [
            *draw.search("files", file["name"], file_id),
            *draw.look_up_relation(person),
            call("files.share_file", file_id=file_id, email=person["email"]),
        ],
        changed=[("files", file_id, {"shared_with": (*file["shared_with"], person["email"])})],
    )


def _sort_files(draw: Draw) -> Plan:
    def movable(f: Any) -> bool:
        return f["kind"] == kind and not f["locked"]

    kind = draw.rng.choice(("table", "picture", "sound", "archive"))
    folder_id, rows = draw.pick_many("files", "folder_id", 2, 4, movable)
    folder: Any = draw.world.get("folders", folder_id)
    target_id, target = draw.pick("folders", lambda f: f["name"] != folder["name"])
    return plan(
        {"kind": kind, "folder": folder["name"], "target": target["name"]},
        [
            *draw.search("folders", folder["name"], folder_id),
            *draw.search("folders", target["name"], target_id),
            *draw.listing("files", folder_id=folder_id, kind=kind),
            *(call("files.move_file", file_id=i, folder_id=target_id) for i, _ in rows),
        ],
        changed=[("files", i, {"folder_id": target_id}) for i, _ in rows],
    )


def _copy(draw: Draw) -> Plan:
    file_id, file = draw.pick("files")
    folder_id, folder = draw.pick("folders")
    kept = {k: file[k] for k in ("name", "kind", "size_kb", "text")}
    return plan(
        {"file": file["name"], "folder": folder["name"]},
        [
            *draw.search("files", file["name"], file_id),
            *draw.search("folders", folder["name"], folder_id),
            call("files.copy_file", file_id=file_id, folder_id=folder_id),
        ],
        added=[draw.row("files", **kept, folder_id=folder_id)],
    )


def _largest(draw: Draw) -> Plan:
    folder_id, rows = draw.pick_many("files", "folder_id", 8, 30)
    folder: Any = draw.world.get("folders", folder_id)
    largest = max(rows, key=lambda pair: pair[1]["size_kb"])
    find = draw.listing("files", [largest[0]], folder_id=folder_id, sort_by="-size_kb")
    return plan(
        {"folder": folder["name"]},
        [*draw.search("folders", folder["name"], folder_id), *find],
        answer=largest[1]["name"],
    )


def _unshare(draw: Draw) -> Plan:
    emails = [e for _, f in draw.rows("files", lambda f: not f["locked"]) for e in f["shared_with"]]
    locked = {e for _, f in draw.rows("files", lambda f: f["locked"]) for e in f["shared_with"]}
    email = draw.rng.choice([e for e in emails if e not in locked])
    shared = draw.rows("files", lambda f: email in f["shared_with"])
    person = draw.by("email", email)
    return plan(
        {"name": person["name"], "files": ", ".join(f["name"] for _, f in shared)},
        [
            *draw.look_up(person),
            *(c for i, f in shared for c in draw.search("files", f["name"], i)),
            *(call("files.unshare_file", file_id=i, email=email) for i, _ in shared),
        ],
        changed=[
            ("files", i, {"shared_with": tuple(e for e in f["shared_with"] if e != email)})
            for i, f in shared
        ],
    )


def _append(draw: Draw) -> Plan:
    note_id, note = draw.pick("notes", lambda n: not _locked(draw, n))
    line = draw.rng.choice(("Ask again in spring.", "Cheaper on Tuesdays.", "Borrow the big one."))
    return plan(
        {"title": note["title"], "line": line},
        [
            *draw.search("notes", note["title"], note_id),
            call("notes.append_to_note", note_id=note_id, text=line),
        ],
        changed=[("notes", note_id, {"text": f"{note['text']}\n{line}"})],
    )


def _locked(draw: Draw, note: Any) -> bool:
    book: Any = draw.world.get("notebooks", note["notebook_id"])
    return bool(book["locked"])


def _phone_note(draw: Draw) -> Plan:
    person = draw.relative()
    book_id, book = draw.pick("notebooks", lambda b: not b["locked"])
    given = {
        "title": f"Phone of my {person['relation']}",
        "notebook_id": book_id,
        "text": person["phone"],
    }
    return plan(
        {"relation": person["relation"], "book": book["name"], "title": given["title"]},
        [
            *draw.look_up_relation(person),
            *draw.search("notebooks", book["name"], book_id),
            call("notes.create_note", **given),
        ],
        added=[draw.row("notes", **given)],
    )


SCENARIOS = (
    Scenario(name="new_task", difficulty=2, build=_new_task, texts=(
        'Add the task "{title}" to the project "{project}": due {due}, priority {priority}.',
        'In "{project}" somebody must "{title}" until {due}; create the task for yourself with '
        '{priority} priority.',
        'New {priority} priority task of yours in "{project}": "{title}", due on {due}.',
    )),
    Scenario(name="hand_over_tasks", difficulty=3, build=_hand_over, texts=(
        "{name} leaves. Assign all their tasks that are not done to {other}.",
        "Every unfinished task of {name}, in whatever project, is {other}'s from now on.",
        "Hand the tasks of {name} over to {other}, apart from those that are done.",
    )),
    Scenario(name="complete_my_tasks", difficulty=3, build=_urgent, texts=(
        'Complete your own unfinished tasks of "{project}" whose priority is normal or high.',
        'In the project "{project}" you finished all that was yours, apart from low priority '
        'tasks. Complete those tasks.',
        'Set your tasks in "{project}" to complete, unless they are of low priority or done '
        'already.',
    )),
    Scenario(name="project_hours", difficulty=2, build=_hours, texts=(
        'How many hours of work are left in "{project}" (tasks that are not done)?',
        'Add up the estimated hours of all tasks of "{project}" that are not done yet.',
        'What do the hours of the unfinished tasks in "{project}" come to?',
    )),
    Scenario(name="comment_task", difficulty=2, build=_comment, held_out=True, texts=(
        'Comment on the task "{title}": "{text}"',
        'Leave the comment "{text}" at the task "{title}".',
        'The task "{title}" needs a comment of yours that says "{text}"',
    )),
    Scenario(name="tasks_to_checklist", difficulty=3, build=_to_checklist, held_out=True, texts=(
        'Make a checklist in notes named "{project}" with a line for each open high priority '
        'task of that project (its title).',
        'For the project "{project}", copy the titles of all open tasks of high priority into a '
        'new checklist of the same name.',
        'A new checklist "{project}" should list the titles of the project\'s open high priority '
        'tasks.',
    )),
    Scenario(name="share_file", difficulty=2, build=_share, texts=(
        "Share the file {file} with your {relation}.",
        "Your {relation} should be able to read {file}.",
        "Give your {relation} access to the file {file}.",
    )),
    Scenario(name="sort_files", difficulty=3, build=_sort_files, texts=(
        'Move every file of kind {kind} that is not locked from the folder "{folder}" to '
        '"{target}".',
        'The folder "{folder}" should hold no unlocked {kind} files any more: put them into '
        '"{target}".',
        'Files of kind {kind} in "{folder}" belong into "{target}". Move them, but leave locked '
        'ones.',
    )),
    Scenario(name="copy_file", difficulty=2, build=_copy, held_out=True, texts=(
        'Copy the file {file} into the folder "{folder}".',
        'Put a copy of {file} into "{folder}".',
        'The folder "{folder}" needs a copy of {file}.',
    )),
    Scenario(name="largest_file", difficulty=2, build=_largest, texts=(
        'Which file in the folder "{folder}" is the largest? Answer with its name.',
        'Name the biggest file of "{folder}".',
        'What is the name of the file that takes most space in "{folder}"?',
    )),
    Scenario(name="unshare_files", difficulty=2, build=_unshare, held_out=True, texts=(
        "{name} should have no access any more to: {files}.",
        "Stop sharing {files} with {name}.",
        "Take {name} off the people who may read {files}.",
    )),
    Scenario(name="append_to_note", difficulty=1, build=_append, texts=(
        'Add the line "{line}" at the end of the note "{title}".',
        'The note "{title}" gets another line: "{line}"',
        'Append "{line}" to your note "{title}".',
    )),
    Scenario(name="note_phone", difficulty=3, build=_phone_note, texts=(
        'Write the phone number of your {relation} (nothing else) into a new note "{title}" in '
        'the notebook "{book}".',
        'In "{book}", make a note titled "{title}" whose text is your {relation}\'s phone number.',
        'Create the note "{title}" in the notebook "{book}". Its text: the number of your '
        '{relation}, as the contacts have it.',
    )),
    one("complete_task", "complete_task", "tasks", sets(state="done"), (
        'Complete the task "{title}".',
        'You have done "{title}": mark the task as complete.',
        'The task "{title}" is finished.',
    ), by="title", keep=lambda t: t["state"] != "done"),
    one("postpone_task", "postpone_task", "tasks", lambda draw, row: (
        {"due": "2033-01-31"}, {"due": "2033-01-31"}, {"new": "2033-01-31"}
    ), (
        'Postpone the task "{title}" to {new}.',
        'The task "{title}" is not due before {new}.',
        'Give yourself until {new} for "{title}".',
    ), by="title", held_out=True),
    one("archive_project", "archive_project", "projects", sets(state="archived"), (
        'Archive the project "{name}".',
        'The project "{name}" is over: archive it.',
        'Put the project "{name}" into the archive.',
    ), by="name"),
    one("star_file", "star_file", "files", sets(starred=True), (
        "Star the file {name}.",
        "Put a star on {name}.",
        "The file {name} is important: star it.",
    ), by="name", keep=lambda f: not f["starred"]),
    one("pin_note", "pin_note", "notes", sets(pinned=True), (
        'Pin the note "{title}".',
        'The note "{title}" should stay on top.',
        'Keep the note "{title}" at the top of its list.',
    ), by="title", keep=lambda n: not n["pinned"]),
    every("delete_links", "delete_link", "links", removes(), (
        "Delete all public links that let readers change the file.",
        "No file link may be editable: remove those that are.",
        "Remove every link to a file that can be used for editing.",
    ), key="editable", keep=lambda link: bool(link["editable"])),
    every("tick_list", "tick_item", "check_items", sets(done=True), (
        'Tick everything that is still open on the checklist "{owner}".',
        'All of the checklist "{owner}" is done: tick the rest.',
        'The checklist "{owner}" should have no open line any more.',
    ), key="checklist_id", filters={"done": False}, describe=named("checklists", "title")),
    every("archive_notes", "archive_note", "notes", sets(state="archived"), (
        'Archive every active note of the notebook "{owner}".',
        'Nothing of the notebook "{owner}" should be active any more: archive its notes.',
        'Put all active notes of "{owner}" into the archive.',
    ), key="notebook_id", filters={"state": "active"}, describe=named("notebooks"), held_out=True,
        keep=lambda note: True),
)  # fmt: skip
