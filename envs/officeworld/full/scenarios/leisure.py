"""Music and the phone."""

from typing import Any

from loopwright.envs.officeworld.full.draw import Draw, call, plan
from loopwright.envs.officeworld.full.families import by_phone, one, removes, sets, total
from loopwright.envs.officeworld.scenario import Plan, Scenario


def _best_of(draw: Draw) -> Plan:
    genre, rows = draw.pick_many("songs", "genre", 3, 8, lambda s: s["rating"] == 5)
    title = draw.rng.choice(("Best of the best", "Five stars", "For the train"))
    given = {"title": title, "songs": tuple(i for i, _ in rows)}
    return plan(
        {"genre": genre, "title": title},
        [*draw.listing("songs", genre=genre), call("music.create_playlist", **given)],
        added=[draw.row("playlists", **given)],
    )


def _most_played(draw: Draw) -> Plan:
    genre = draw.rng.choice(("folk", "jazz", "rock", "ambient", "choral", "electro"))
    song_id, song = max(
        draw.rows("songs", lambda s: s["genre"] == genre), key=lambda pair: pair[1]["plays"]
    )
    find = draw.listing("songs", [song_id], genre=genre, sort_by="-plays")
    return plan({"genre": genre}, find, answer=song["title"])


def _play(draw: Draw) -> Plan:
    player: Any = draw.world.get("player", 1)
    song_id, song = draw.pick("songs")
    volume = draw.rng.choice(range(5, 100, 10))
    change = {"song_id": song_id, "playing": True, "volume": volume}
    return plan(
        {"title": song["title"], "volume": volume},
        [
            *draw.search("songs", song["title"], song_id),
            call("music.set_volume", percent=volume),
            call("music.play_song", song_id=song_id),
        ],
        changed=[("player", 1, {k: v for k, v in change.items() if player[k] != v})],
    )


def _queue_album(draw: Draw) -> Plan:
    album_id, songs = draw.pick_many("songs", "album_id", 2, 5)
    album: Any = draw.world.get("albums", album_id)
    return plan(
        {"album": album["title"]},
        [
            *draw.search("albums", album["title"], album_id),
            *draw.listing("songs", album_id=album_id),
            *(call("music.create_queue_entry", song_id=i) for i, _ in songs),
        ],
        added=[draw.row("queue", song_id=i) for i, _ in songs],
    )


def _short_songs(draw: Draw) -> Plan:
    playlist_id, playlist = draw.pick("playlists")
    songs: list[Any] = [(i, draw.world.get("songs", i)) for i in playlist["songs"]]
    lengths = sorted({s["seconds"] for _, s in songs})
    limit = lengths[draw.rng.randint(1, min(3, len(lengths) - 1))]
    short = [i for i, s in songs if s["seconds"] < limit]
    return plan(
        {"playlist": playlist["title"], "limit": limit},
        [
            *draw.search("playlists", playlist["title"], playlist_id),
            call("music.show_playlist", playlist_id=playlist_id),
            *(call("music.show_song", song_id=i) for i, _ in songs),
            *(
                call("music.remove_song_from_playlist", playlist_id=playlist_id, song_id=i)
                for i in short
            ),
        ],
        changed=[
            ("playlists", playlist_id, {"songs": tuple(i for i, _ in songs if i not in short)})
        ],
    )


def _alarm(draw: Draw) -> Plan:
    title = draw.rng.choice(("Early shift", "Airport", "Medicine", "Swimming"))
    given = {
        "time": f"{draw.rng.randint(5, 9):02d}:{draw.rng.choice((5, 25, 50)):02d}",
        "title": title,
    }
    return plan(given, [call("phone.create_alarm", **given)], added=[draw.row("alarms", **given)])


def _call_back(draw: Draw) -> Plan:
    rows = draw.rows("voicemails", lambda v: not v["heard"])
    limit = sorted(v["seconds"] for _, v in rows)[-draw.rng.randint(2, min(4, len(rows)))]
    long = [(i, v) for i, v in rows if v["seconds"] >= limit]
    return plan(
        {"limit": limit},
        [
            *draw.listing("voicemails", heard=False),
            *(
                c for i, v in long for c in (
                    call("phone.call_number", phone=v["phone"], minutes=5),
                    call("phone.mark_heard_voicemail", voicemail_id=i),
                )
            ),
        ],
        added=[draw.row("calls", phone=v["phone"], minutes=5) for _, v in long],
        changed=[("voicemails", i, {"heard": True}) for i, _ in long],
    )  # fmt: skip


def _block(draw: Draw) -> Plan:
    person = draw.person()
    given = {"phone": person["phone"], "reason": "privacy"}
    return plan(
        {"name": person["name"]},
        [*draw.look_up(person), call("phone.create_blocked_number", **given)],
        added=[draw.row("blocked", **given)],
    )


def _alarms_off(draw: Draw) -> Plan:
    rows = draw.rows("alarms", lambda a: a["enabled"])
    return plan(
        {},
        [
            *draw.listing("alarms", enabled=True),
            *(call("phone.disable_alarm", alarm_id=i) for i, _ in rows),
        ],
        changed=[("alarms", i, {"enabled": False}) for i, _ in rows],
    )


SCENARIOS = (
    Scenario(name="playlist_of_favorites", difficulty=3, build=_best_of, texts=(
        'Make a playlist "{title}" of all {genre} songs that you rated 5, in the order of their '
        'ids.',
        'All songs of the genre {genre} with your rating 5 belong into a new playlist "{title}", '
        'sorted by id.',
        'Create the playlist "{title}". It holds, by ascending id, each {genre} song you gave '
        'five stars.',
    )),
    Scenario(name="most_played", difficulty=2, build=_most_played, texts=(
        "Which {genre} song have you played most? Answer with its title.",
        "Name the {genre} song with the most plays.",
        "What is the title of your most played song in the genre {genre}?",
    )),
    Scenario(name="play_song", difficulty=2, build=_play, texts=(
        'Set the music volume to {volume} and play "{title}".',
        'Play "{title}" at volume {volume}.',
        'You want to hear "{title}" now, with the volume of the music at {volume}.',
    )),
    Scenario(name="queue_album", difficulty=3, build=_queue_album, held_out=True, texts=(
        'Queue all songs of the album "{album}".',
        'Put every song of "{album}" into the music queue.',
        'The songs of the album "{album}" should wait in the queue.',
    )),
    Scenario(name="drop_short_songs", difficulty=3, build=_short_songs, held_out=True, texts=(
        'Remove the songs shorter than {limit} seconds from the playlist "{playlist}".',
        'The playlist "{playlist}" should have no song that lasts less than {limit} seconds.',
        'Take what is below {limit} seconds off "{playlist}".',
    )),
    Scenario(name="set_alarm", difficulty=1, build=_alarm, texts=(
        'Set an alarm "{title}" for {time}.',
        'The phone should ring at {time}; call the alarm "{title}".',
        'You need an alarm at {time} with the title "{title}".',
    )),
    Scenario(name="call_back", difficulty=3, build=_call_back, texts=(
        "Call back everybody whose unheard voicemail is {limit} seconds or longer (5 minutes "
        "each), and mark those voicemails as heard.",
        "For each voicemail you have not heard that lasts at least {limit} seconds: call its "
        "number for 5 minutes, then mark it heard.",
        "Long unheard voicemails ({limit} seconds and more) deserve a call of 5 minutes to their "
        "number; they count as heard then.",
    )),
    Scenario(name="block_number", difficulty=2, build=_block, held_out=True, texts=(
        'Block the phone number of {name}, with the reason "privacy".',
        '{name} may not call you any more: block their number (reason: "privacy").',
        'Put the number of {name} on the list of blocked ones; the reason is "privacy".',
    )),
    Scenario(name="alarms_off", difficulty=2, build=_alarms_off, texts=(
        "Disable all alarms that are on.",
        "No alarm should ring tomorrow: disable each that is enabled, delete none.",
        "Turn every enabled alarm of the phone off.",
    )),
    one("like_song", "like_song", "songs", sets(liked=True), (
        'Like the song "{title}".',
        'You like "{title}": say so in the music app.',
        'Give the song "{title}" a like.',
    ), by="title", keep=lambda s: not s["liked"] and "again" in s["title"]),
    one("rate_song", "rate_song", "songs", lambda draw, row: (
        {"rating": 1}, {"rating": 1}, {}
    ), (
        'Rate the song "{title}" with one star.',
        'One star for "{title}" in music, no more.',
        'The song "{title}" is bad: rate it 1.',
    ), by="title", keep=lambda s: s["rating"] != 1),
    one("delete_alarm", "delete_alarm", "alarms", removes(), (
        'Delete the alarm "{title}".',
        'The alarm "{title}" is not needed any more; remove it.',
        'Remove the alarm "{title}" from your phone.',
    ), by="title"),
    total("call_minutes", "calls", (
        "How many minutes have you talked on the phone with {name}?",
        "Add up the minutes of all calls with {name}.",
        "What do your phone calls with {name} come to, in minutes?",
    ), key="phone", value_of=lambda c: int(c["minutes"]), describe=by_phone),
)  # fmt: skip
