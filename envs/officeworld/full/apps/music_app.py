"""Music: artists, albums, songs, playlists, a queue, a player."""

from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, Office, Param
from loopwright.envs.officeworld.columns import choice, flag, many, number, ref, text
from loopwright.envs.officeworld.full.declare import OfficeApp, Seeding
from loopwright.envs.officeworld.resources import Resource
from loopwright.envs.officeworld.state import Row

GENRES = ("folk", "jazz", "rock", "ambient", "choral", "electro")
ARTIST = Resource(
    name="artist",
    plural="artists",
    table="artists",
    doc="an artist",
    verbs=("list", "search", "show", "count"),
    fields=(
        text("name", "name of the artist"),
        choice("genre", "kind of music", GENRES),
        number("listeners", "listeners a month", listed=False),
        flag("followed", "whether you follow them"),
    ),
    flags={"followed": ("follow", "unfollow")},
)
ALBUM = Resource(
    name="album",
    plural="albums",
    table="albums",
    doc="an album",
    verbs=("list", "search", "show", "count"),
    fields=(
        text("title", "its title"),
        ref("artist_id", "artists", "id of the artist"),
        number("year", "when it came out"),
        flag("saved", "whether it is in your library"),
    ),
    flags={"saved": ("save", "unsave")},
)
SONG = Resource(
    name="song",
    plural="songs",
    table="songs",
    doc="a song",
    verbs=("list", "search", "show", "count"),
    fields=(
        text("title", "its title"),
        ref("album_id", "albums", "id of the album"),
        choice("genre", "kind of music", GENRES),
        number("seconds", "how long it lasts"),
        number("plays", "how often you played it"),
        number("rating", "what you gave it, 0 for nothing yet", default=0),
        flag("liked", "whether you like it"),
        flag("downloaded", "whether it is on your phone", listed=False),
    ),
    flags={"liked": ("like", "unlike"), "downloaded": ("download", "undownload")},
)
PLAYLIST = Resource(
    name="playlist",
    plural="playlists",
    table="playlists",
    doc="a playlist of yours",
    fields=(
        text("title", "its title"),
        text("about", "what it is for", default="", listed=False),
        many("songs", "ids of its songs, in order", "songs", listed=False, ordered=True),
        flag("public", "whether others see it"),
    ),
    flags={"public": ("publish", "unpublish")},
    members={"songs": ("add_song_to_playlist", "remove_song_from_playlist", "song_id")},
)
QUEUE = Resource(
    name="queue_entry",
    plural="queue_entries",
    table="queue",
    doc="a song waiting to be played",
    verbs=("list", "create", "delete", "count"),
    fields=(ref("song_id", "songs", "id of the song"),),
)


def rate_song(office: Office, song_id: int, rating: int) -> None:
    """Give a song one to five stars."""
    if SONG.row(office, song_id)["rating"] == rating:
        raise ApiError("conflict", "the song has this rating already")
    office.world.update("songs", song_id, rating=rating)


def clear_queue(office: Office) -> None:
    """Nothing waits any more."""
    for entry, _ in list(office.world.rows("queue")):
        office.world.remove("queue", entry)


def show_player(office: Office) -> Any:
    """What is played, and how loud."""
    return dict(office.world.get("player", 1) or {})


def play_song(office: Office, song_id: int) -> None:
    """Play a song now."""
    SONG.row(office, song_id)
    office.world.update("player", 1, song_id=song_id, playing=True)


def pause_player(office: Office) -> None:
    """Silence."""
    office.world.update("player", 1, playing=False)


def set_volume(office: Office, percent: int) -> None:
    """How loud."""
    office.world.update("player", 1, volume=percent)


def show_playlist_length(office: Office, playlist_id: int) -> Any:
    """Songs and seconds of a playlist."""
    songs: Any = PLAYLIST.row(office, playlist_id)["songs"]
    seconds: Any = [SONG.row(office, song)["seconds"] for song in songs]
    return {"songs": len(songs), "seconds": sum(seconds)}


FIRST = (
    "Silver",
    "Hollow",
    "Northern",
    "Paper",
    "Velvet",
    "Copper",
    "Distant",
    "Amber",
    "Quiet",
    "Wild",
)
SECOND = (
    "Harbor",
    "Foxes",
    "Lanterns",
    "Tides",
    "Orchard",
    "Engines",
    "Meadow",
    "Signals",
    "Sparrows",
    "Windows",
)
SEASONS = ("Winter", "Morning", "Midnight", "August", "Sunday")


def seed(s: Seeding) -> None:
    """Sixteen artists, forty albums, two hundred songs, six playlists; titles are unique."""
    pairs = [f"{a} {b}" for a in FIRST for b in SECOND]
    s.rng.shuffle(pairs)
    artists = s.fill(
        "artists",
        (
            {
                "name": f"The {pairs.pop()}",
                "genre": s.rng.choice(GENRES),
                "listeners": s.rng.randint(100, 90000),
                "followed": s.rng.random() < 0.3,
            }
            for _ in range(16)
        ),
    )
    albums = s.fill(
        "albums",
        (
            {
                "title": pairs.pop(),
                "artist_id": s.rng.choice(artists),
                "year": s.rng.randint(1990, 2030),
                "saved": s.rng.random() < 0.4,
            }
            for _ in range(40)
        ),
    )
    titles = [f"{season} {word}" for season in SEASONS for word in (*FIRST, *SECOND)]
    titles += [f"{word} again" for word in (*FIRST, *SECOND)]
    rows: list[Row] = [
        {
            "title": title,
            "album_id": s.rng.choice(albums),
            "genre": s.rng.choice(GENRES),
            "seconds": s.rng.randint(90, 420),
            "plays": n,
            "rating": s.rng.choice((0, 0, 2, 3, 4, 5)),
            "liked": s.rng.random() < 0.3,
            "downloaded": s.rng.random() < 0.2,
        }
        for title, n in zip(titles, s.rng.sample(range(500), len(titles)), strict=True)
    ]
    songs = s.fill("songs", rows)
    s.fill(
        "playlists",
        (
            {
                "title": title,
                "songs": tuple(s.rng.sample(songs, s.rng.randint(5, 12))),
                "public": s.rng.random() < 0.3,
            }
            for title in (
                "Slow cooking",
                "Long drive",
                "Deep work",
                "Rainy days",
                "Running",
                "Party mix",
            )
        ),
    )
    s.fill("queue", ({"song_id": song} for song in s.rng.sample(songs, 4)))
    s.tables["player"] = {
        1: {"song_id": songs[0], "playing": False, "volume": s.rng.randint(1, 9) * 10}
    }


STARS = Param(name="rating", kind="int", doc="1 to 5", low=1, high=5)
PERCENT = Param(name="percent", kind="int", doc="0 to 100", low=0, high=100)
APP = OfficeApp(
    name="music",
    doc="Music: artists, albums, songs, your playlists, the queue and the player.",
    resources=(ARTIST, ALBUM, SONG, PLAYLIST, QUEUE),
    tables=("player",),
    seed=seed,
    apis=(
        Api(
            name="rate_song",
            doc="Give a song stars.",
            params=(SONG.id_param, STARS),
            handler=rate_song,
            writes=True,
        ),
        Api(name="clear_queue", doc="Empty the queue.", handler=clear_queue, writes=True),
        Api(
            name="show_player",
            doc="What is played, and how loud.",
            handler=show_player,
            returns="song_id, playing, volume",
        ),
        Api(
            name="play_song",
            doc="Play a song now.",
            params=(SONG.id_param,),
            handler=play_song,
            writes=True,
        ),
        Api(name="pause_player", doc="Stop playing.", handler=pause_player, writes=True),
        Api(
            name="set_volume",
            doc="Set how loud it plays.",
            params=(PERCENT,),
            handler=set_volume,
            writes=True,
        ),
        Api(
            name="show_playlist_length",
            doc="Songs and seconds of a playlist.",
            params=(PLAYLIST.id_param,),
            handler=show_playlist_length,
            returns="songs, seconds",
        ),
    ),
)
