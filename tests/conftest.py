"""What several test files share: one tiny policy, cloned just enough that its rewards differ."""

import pytest

from tests.tiny_run import clone_policy


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a cloned tiny policy for officeworld's easiest tasks."""
    return clone_policy(tmp_path_factory.mktemp("policy"))
