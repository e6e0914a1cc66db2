"""A search engine played by a language model, through any OpenAI-compatible endpoint.

ZeroSearch (arXiv:2505.04588), section 3: the model is told the question, its gold answer and
whether to write useful or noisy documents. Whichever episode asks, its own question and answer go
along. A model that cannot be asked, or does not write documents, is an infrastructure error.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence

from loopwright.envs.endpoint import Endpoint, EndpointError
from loopwright.envs.search.backends import World
from loopwright.envs.search.knowledge import Document
from loopwright.envs.search.searcher import Query, draw

_NUMBERED = re.compile(r"^\s*(?:Doc(?:ument)?\s*)?\(?(\d+)\)?\s*[.:)]\s*", re.IGNORECASE)
_KIND = {
    False: "useful: together they contain what is needed to answer the question",
    True: "noisy: they look relevant to the query, but none helps to answer the question",
}
MAX_WORDS = 60  # of one document; what is longer is cut
_SEED_RANGE = 2**31


class LLMSimulator:
    """Asks the model at `url`; answers are kept, so that the same query of the same task at the
    same step is asked once. Documents are `words` long, at most `tokens` tokens an answer."""

    simulated = True

    def __init__(
        self,
        world: World | None,
        url: str,
        model: str,
        words: int = 30,
        tokens: int = 600,
        temperature: float = 0.0,
        timeout_s: float = 30.0,
        tries: int = 3,
        format_tries: int = 2,
        api_key_env: str = "",
        cache: int = 100_000,
    ) -> None:
        """Raises `EndpointError` for bad values, and if nothing answers at `url`."""
        if not 1 <= words <= MAX_WORDS or min(tokens, format_tries, cache) < 1:
            raise EndpointError(
                f"search backend_options: words {words}, tokens {tokens}, "
                f"format_tries {format_tries}, cache {cache}: words must be 1 to {MAX_WORDS}, "
                "the rest at least 1"
            )
        self._endpoint = Endpoint(
            url=url, model=model, timeout_s=timeout_s, tries=tries, api_key_env=api_key_env
        )
        self._endpoint.check()
        self._words, self._tokens, self._temperature = words, tokens, temperature
        self._format_tries, self._room = format_tries, cache
        self._kept: OrderedDict[tuple[str, str, int, bool, int], list[Document]] = OrderedDict()

    async def search(self, query: Query) -> Sequence[Document]:
        """The model's documents. Raises `EndpointError` if there are none after `format_tries`."""
        key = (query.task_id, query.text, query.step, query.noisy, query.documents)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        said = ""
        for attempt in range(self._format_tries):
            said = await self._endpoint.chat(
                self._messages(query),
                max_tokens=self._tokens,
                temperature=self._temperature,
                seed=int(draw("simulator", *key, attempt) * _SEED_RANGE),
            )
            documents = _documents(said, query)
            if documents:
                self._keep(key, documents)
                return documents
        raise EndpointError(
            f"{self._endpoint.url}: the simulator wrote no documents in {self._format_tries} "
            f"tries; the last answer began {said[:80]!r}"
        )

    def close(self) -> None:
        """Nothing to free: the connection is not kept."""

    def _keep(self, key: tuple[str, str, int, bool, int], documents: list[Document]) -> None:
        self._kept[key] = documents
        while len(self._kept) > self._room:
            self._kept.popitem(last=False)

    def _messages(self, query: Query) -> list[dict[str, str]]:
        system = (
            "You are a search engine. Write search results for the user's query: "
            f"{query.documents} documents of about {self._words} words each, one a line, as "
            "'Doc 1: …'. Never answer the user, never add anything else. "
            f"The documents must be {_KIND[query.noisy]}."
        )
        user = (
            f"Question: {query.question}\nAnswer: {'; '.join(query.answers)}\nQuery: {query.text}"
        )
        # a policy may write half a surrogate pair, which no JSON body can hold
        return [
            {"role": role, "content": text.encode(errors="replace").decode()}
            for role, text in (("system", system), ("user", user))
        ]


def _documents(said: str, query: Query) -> list[Document]:
    """The numbered lines of an answer; lines without a number go on with the former document."""
    texts: list[str] = []
    for line in said.splitlines():
        numbered = _NUMBERED.match(line)
        if numbered:
            texts.append(line[numbered.end() :].strip())
        elif texts and line.strip():
            texts[-1] = f"{texts[-1]} {line.strip()}".strip()
    whole = [
        " ".join(text.replace("<", "‹").replace(">", "›").split()[:MAX_WORDS]) for text in texts
    ]
    return [
        Document(id=f"{query.task_id}/{query.step}/{n}", title=query.text[:40], text=text)
        for n, text in enumerate([t for t in whole if t][: query.documents])
    ]
