"""What several test files share: one tiny policy, cloned just enough that its rewards differ, and
two trainer ranks."""

from collections.abc import Iterator

import pytest

from tests.rank_world import RankWorld
from tests.tiny_run import clone_policy


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny policy that solves one of officeworld's easiest tasks now and then."""
    return clone_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def world() -> Iterator[RankWorld]:
    """Two processes that have met; started by the first test that needs them."""
    with RankWorld(2) as world:
        yield world
