"""The torch engine: the shared conformance suite, and what only it promises."""

from collections.abc import Iterator

import pytest

from loopwright.actors.torch_engine import TorchEngine
from tests.engine_conformance import EngineBench, EngineConformance


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineBench]:
    folder = tmp_path_factory.mktemp("model")
    with EngineBench(TorchEngine, folder, tied=request.param) as bench:
        yield bench


class TestTorchEngine(EngineConformance):
    """The shared suite."""
