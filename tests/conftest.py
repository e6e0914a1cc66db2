"""What several test files share: one tiny policy, cloned just enough that its rewards differ."""

import pytest

from tests.tiny_run import clone_policy


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny policy that solves one of officeworld's easiest tasks now and then."""
    return clone_policy(tmp_path_factory.mktemp("policy"))
