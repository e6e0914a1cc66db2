"""Which searcher answers: a table of names, each with its own options."""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from loopwright.envs.protocol import EnvError
from loopwright.envs.search.relations import Style
from loopwright.envs.search.searcher import CorpusSimulator, Searcher

World = tuple[Style, int, int]  # style, entities, seed
BACKENDS: Mapping[str, str] = MappingProxyType(
    {
        "corpus": "",  # the simulator over the generated world: no options
        "llm": "loopwright.envs.search.simulator:LLMSimulator",
        "bm25": "loopwright.envs.search.retrieval:BM25",
        "dense": "loopwright.envs.search.retrieval:Dense",
        "retrieve": "loopwright.envs.search.retrieval:Retriever",
    }
)


def build_searcher(name: str, options: Mapping[str, Any], world: World | None) -> Searcher:
    """The searcher `name`. `world` is the generated world, None for the user's questions. Raises
    `EnvError` for an unknown name or option, and whatever the searcher refuses."""
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(BACKENDS)}"
        raise EnvError(f"search backend = {name!r}: unknown; {hint}")
    if name == "corpus":
        if world is None:
            raise EnvError(
                "search backend = 'corpus' simulates over generated questions, not over a file's; "
                "set backend = 'bm25' with your corpus, or 'llm'"
            )
        if options:
            raise EnvError(f"search backend_options {sorted(options)}: 'corpus' takes none")
        return CorpusSimulator(*world)
    module, _, attribute = BACKENDS[name].partition(":")
    searcher = getattr(importlib.import_module(module), attribute)
    parameters = list(inspect.signature(searcher).parameters)[1:]  # without the world
    for option in options:
        if option not in parameters:
            near = difflib.get_close_matches(option, parameters, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(parameters)}"
            raise EnvError(f"search backend_options: {name!r} has no {option!r}; {hint}")
    try:
        built: Searcher = searcher(world, **options)
    except TypeError as error:
        raise EnvError(f"search backend_options of {name!r}: {error}") from error
    return built
