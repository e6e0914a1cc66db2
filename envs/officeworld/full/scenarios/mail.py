"""Emails: sending, answering, filing."""

from loopwright.envs.officeworld.full.draw import Draw, call, plan
from loopwright.envs.officeworld.full.families import by_email, every, one, removes, sets, total
from loopwright.envs.officeworld.scenario import Plan, Scenario

NEWS = (
    ("Moved to Thursday", "We meet on Thursday instead."),
    ("Keys", "The spare keys are with the neighbor."),
    ("Well done", "Great work on the last delivery!"),
    ("Short question", "Which version should I print?"),
)


def _send(draw: Draw) -> Plan:
    person = draw.person()
    subject, body = draw.rng.choice(NEWS)
    given = {"recipients": (person["email"],), "subject": subject, "body": body}
    return plan(
        {"name": person["name"], "subject": subject, "body": body},
        [*draw.look_up(person), call("mail.send_email", **given)],
        added=[draw.row("emails", **given)],
    )


def _send_relative(draw: Draw) -> Plan:
    person = draw.relative()
    subject, body = draw.rng.choice(NEWS)
    given = {"recipients": (person["email"],), "subject": subject, "body": body}
    return plan(
        {"relation": person["relation"], "subject": subject, "body": body},
        [*draw.look_up_relation(person), call("mail.send_email", **given)],
        added=[draw.row("emails", **given)],
    )


def _reply(draw: Draw) -> Plan:
    sender, rows = draw.pick_many("emails", "sender", 1, 3, lambda r: r["folder"] == "inbox")
    newest = max(row["date"] for _, row in rows)
    last = [(i, row) for i, row in rows if row["date"] == newest][-1]
    if sum(row["date"] == newest for _, row in rows) > 1:  # which one is newest would be a guess
        sender = draw.rng.choice(_senders_of_one(draw))
        last = draw.rows("emails", lambda r: r["folder"] == "inbox" and r["sender"] == sender)[0]
    text = draw.rng.choice(("Yes, gladly.", "Not this week, sorry.", "I will look into it."))
    row_id, row = last
    person = draw.by("email", sender)
    find = draw.listing("emails", [row_id], folder="inbox", sender=sender, sort_by="-date")
    return plan(
        {"name": person["name"], "text": text},
        [*draw.look_up(person), *find, call("mail.reply_to_email", email_id=row_id, body=text)],
        added=[
            draw.row("emails", recipients=(sender,), subject=f"Re: {row['subject']}", body=text)
        ],
    )


def _senders_of_one(draw: Draw, folder: str = "inbox") -> list[str]:
    senders = [row["sender"] for _, row in draw.rows("emails", lambda r: r["folder"] == folder)]
    return [s for s in senders if senders.count(s) == 1]


def _forward(draw: Draw) -> Plan:
    sender = draw.rng.choice(_senders_of_one(draw))
    row_id, row = draw.rows("emails", lambda r: r["folder"] == "inbox" and r["sender"] == sender)[0]
    author = draw.by("email", sender)
    other = draw.person(lambda p: p["email"] != sender)
    to = (other["email"],)
    return plan(
        {"name": author["name"], "other": other["name"]},
        [
            *draw.look_up(author),
            *draw.listing("emails", [row_id], folder="inbox", sender=sender),
            *draw.look_up(other),
            call("mail.forward_email", email_id=row_id, recipients=to),
        ],
        added=[
            draw.row("emails", recipients=to, subject=f"Fwd: {row['subject']}", body=row["body"])
        ],
    )


def _label(draw: Draw) -> Plan:
    sender, _ = draw.pick_many("emails", "sender", 2, 4, lambda r: r["folder"] == "inbox")
    person = draw.by("email", sender)
    every_one = draw.rows("emails", lambda r: r["folder"] == "inbox" and r["sender"] == sender)
    label, name = (
        draw.world.next_id("labels"),
        draw.rng.choice(("Follow up", "Reference", "Waiting")),
    )
    color = draw.rng.choice(("red", "green", "blue"))
    return plan(
        {"name": person["name"], "label": name, "color": color},
        [
            *draw.look_up(person),
            *draw.listing("emails", folder="inbox", sender=sender),
            call("mail.create_label", name=name, color=color),
            *(call("mail.add_label_to_email", email_id=i, label_id=label) for i, _ in every_one),
        ],
        added=[draw.row("labels", name=name, color=color)],
        changed=[("emails", i, {"labels": (*row["labels"], label)}) for i, row in every_one],
    )


def _block(draw: Draw) -> Plan:
    ruled = {row["sender"] for _, row in draw.rows("mail_rules")}
    sender, rows = draw.pick_many(
        "emails", "sender", 2, 4, lambda r: r["folder"] == "inbox" and r["sender"] not in ruled
    )
    person = draw.by("email", sender)
    return plan(
        {"name": person["name"]},
        [
            *draw.look_up(person),
            *draw.listing("emails", folder="inbox", sender=sender),
            call("mail.create_rule", sender=sender, folder="spam"),
            *(call("mail.mark_spam_email", email_id=i) for i, _ in rows),
        ],
        added=[draw.row("mail_rules", sender=sender, folder="spam")],
        changed=[("emails", i, {"folder": "spam"}) for i, _ in rows],
    )


def _old_trash(draw: Draw) -> Plan:
    rows = sorted(draw.rows("emails", lambda r: r["folder"] == "trash"), key=lambda p: p[1]["date"])
    limit = rows[draw.rng.randint(2, 4)][1]["date"]
    old = [(i, row) for i, row in rows if row["date"] <= limit]
    return plan(
        {"limit": limit},
        [
            *draw.listing("emails", folder="trash", before=limit),
            *(call("mail.delete_email", email_id=i) for i, _ in old),
        ],
        removed=[("emails", i) for i, _ in old],
    )


def _send_file(draw: Draw) -> Plan:
    row_id, file = draw.pick("files")
    person = draw.relative()
    subject, body = draw.rng.choice(NEWS)
    given = {
        "recipients": (person["email"],), "subject": subject, "body": body, "files": (row_id,),
    }  # fmt: skip
    return plan(
        {"relation": person["relation"], "file": file["name"], "subject": subject, "body": body},
        [
            *draw.search("files", file["name"], row_id),
            *draw.look_up_relation(person),
            call("mail.send_email", **given),
        ],
        added=[draw.row("emails", **given)],
    )


SCENARIOS = (
    Scenario(name="send_email", difficulty=1, build=_send, texts=(
        'Send {name} an email with the subject "{subject}" that says "{body}"',
        '{name} needs an email from you. Subject: "{subject}". Text: "{body}"',
        'Write to {name} by email: "{body}" Use "{subject}" as the subject.',
    )),
    Scenario(name="email_relative", difficulty=2, build=_send_relative, texts=(
        'Email your {relation}: subject "{subject}", text "{body}"',
        'Your {relation} should get an email about "{subject}" that reads "{body}"',
        'Send an email to your {relation}. It is headed "{subject}" and says "{body}"',
    )),
    Scenario(name="reply_newest", difficulty=2, build=_reply, texts=(
        'Reply to the newest email of {name} in your inbox with "{text}"',
        'Answer what {name} mailed you last (look in the inbox): "{text}"',
        'The most recent inbox email by {name} needs a reply that says "{text}"',
    )),
    Scenario(name="forward_email", difficulty=2, build=_forward, texts=(
        "Forward the email of {name} in your inbox to {other}.",
        "{other} should see what {name} mailed you: forward it from the inbox.",
        "In the inbox there is one email by {name}. Pass it on to {other}.",
    )),
    Scenario(name="label_emails", difficulty=3, build=_label, texts=(
        'Make a new {color} mail label "{label}" and put it on every inbox email of {name}.',
        'All emails of {name} in the inbox should carry a new label "{label}", colored {color}.',
        'Create the {color} label "{label}" and tag with it whatever {name} has in your inbox.',
    )),
    Scenario(name="block_sender", difficulty=3, build=_block, texts=(
        "{name} mails too much. Add a rule that sends their mail to spam, and mark their inbox "
        "emails as spam.",
        "Every inbox email of {name} is spam: mark it so, and set up a rule for the future ones.",
        "Treat {name} as a spammer: a mail rule into spam, and the inbox emails go there now.",
    )),
    Scenario(name="delete_old_trash", difficulty=2, build=_old_trash, held_out=True, texts=(
        "Delete for good the emails in the trash that date from {limit} or earlier.",
        "Empty the mail trash, but only of what is as old as {limit} or older.",
        "Trashed emails up to and including {limit} can be erased for ever.",
    )),
    Scenario(name="email_file", difficulty=3, build=_send_file, held_out=True, texts=(
        'Email the file {file} to your {relation}: subject "{subject}", text "{body}"',
        'Your {relation} needs {file}. Attach it to an email "{subject}" that says "{body}"',
        'Send {file} to your {relation} by email, headed "{subject}" and reading "{body}"',
    )),
    one("delete_draft", "delete_draft", "drafts", removes(), (
        'Delete the email draft "{subject}".',
        'You will not send "{subject}" after all: remove the draft.',
        'Throw away the draft with the subject "{subject}".',
    ), by="subject"),
    every("archive_sender", "archive_email", "emails", sets(folder="archive"), (
        "Archive all emails of {name} that are in your inbox.",
        "Move what {name} mailed you from the inbox to the archive.",
        "The inbox should hold nothing by {name} any more: archive it.",
    ), key="sender", filters={"folder": "inbox"}, describe=by_email),
    every("read_sender", "mark_read_email", "emails", sets(read=True), (
        "Mark every unread inbox email of {name} as read.",
        "You know all that {name} wrote: set their unread emails in the inbox to read.",
        "No email by {name} in the inbox should be unread any more.",
    ), key="sender", filters={"folder": "inbox", "read": False}, describe=by_email, held_out=True),
    total("count_emails", "emails", (
        "How many emails of {name} are in your archive?",
        "Count what {name} mailed you and you archived.",
        "{name} asks how many of their emails are in your archive. Answer with the number.",
    ), key="sender", value_of=lambda _row: 1, filters={"folder": "archive"}, describe=by_email),
)  # fmt: skip
