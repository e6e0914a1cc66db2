"""Running model-written Python: a seccomp zygote, variables kept between cells, API calls answered
by the host.

    session = shared_zygote().session()
    result = await session.run("x = apis.mail.count(); x + 1", answer)

The cell runs in a process of its own that may compute, read and write one socket, and nothing else:
no files, no network, no other process, bounded memory. What a cell wants from the world goes over
that socket to `answer`, so the world is never inside.
"""

from loopwright.envs.sandbox.session import (
    CellResult,
    CellStatus,
    SandboxUnavailable,
    Session,
    Zygote,
    shared_zygote,
)

__all__ = [
    "CellResult",
    "CellStatus",
    "SandboxUnavailable",
    "Session",
    "Zygote",
    "shared_zygote",
]
