"""How the oracle answers: every fact of every chain, one search each, then all answers.

Against noise it repeats the search, as a policy should. Only where the turns left are exactly those
it still needs does it look into the draw, and words its query so that the simulator is useful.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from loopwright.envs.search.knowledge import Document, Fact, Knowledge
from loopwright.envs.search.questions import SEPARATOR, Question
from loopwright.envs.search.tags import Act, render_turn

_WORDINGS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Solver:
    """Plays one episode. Without a world (the user's questions) it searches each question, or the
    titles that support it, and gives the gold answers."""

    questions: Sequence[Question]
    world: Knowledge | None
    constant: bool  # thoughts are the state that the next context starts from
    simulated: bool
    turns: int

    def actions(
        self,
        *,
        noise: Callable[[str], bool],
        documents: Callable[[], Sequence[Document]],
        taken: Callable[[], int],
    ) -> Iterator[str]:
        """Turns, drawn between steps. `noise` says whether a query would be answered with noise
        now, `documents` are the newest search's, `taken` is the number of turns so far."""
        todo = self._queries()
        known: list[str] = []  # of former questions the answering fact alone
        chain = 0  # how many facts of the present question are in it
        for at, (query, fact, last) in enumerate(todo):
            found = False
            while not found:
                spare = self.turns - taken() - (len(todo) - at) - 1
                worded = (
                    query
                    if spare > 0
                    else next((w for w in _wordings(query) if not noise(w)), query)
                )
                yield self._turn("search", worded, [*known, f"{query} ?"])
                found = fact is None or not self.simulated or _states(documents(), self.world, fact)
                if spare <= 0:
                    break
            known.append(self._learned(fact))
            chain += 1
            if last:
                known[-chain:] = known[-1:]
                chain = 0
        yield self._turn("answer", SEPARATOR.join(q.answers[0] for q in self.questions), known)

    def _queries(self) -> Sequence[tuple[str, Fact | None, bool]]:
        """(query, the fact that it is for, whether that is its question's last)."""
        if self.world is None:
            texts = [text for q in self.questions for text in q.titles or (q.text,)]
            return [(text, None, False) for text in texts[: self.turns - 1]]
        return [
            (f"{fact.relation} {self.world.subject_name(fact)}", fact, fact is q.facts[-1])
            for q in self.questions
            for fact in q.facts
        ]

    def _learned(self, fact: Fact | None) -> str:
        if fact is None or self.world is None:
            return ""
        return f"{fact.relation} {self.world.subject_name(fact)} = {self.world.object_name(fact)}"

    def _turn(self, kind: Literal["search", "answer"], text: str, known: Sequence[str]) -> str:
        """The state of constant memory is all that is known and what is asked for; thoughts are the
        newest of it."""
        facts = [k for k in known if k]
        thoughts = " ; ".join(
            facts if self.constant else facts[-2:] if kind == "search" else facts[-1:]
        )
        act = Act(kind=kind, text=text, thoughts=thoughts)
        return render_turn(act, "state" if self.constant else "think")


def _wordings(query: str) -> Iterator[str]:
    """The query in other words that ask for the same."""
    for more in range(_WORDINGS):
        yield f"{query}{' ?' * more}"


def _states(documents: Sequence[Document], world: Knowledge | None, fact: Fact) -> bool:
    return world is None or world.document(fact) in documents
