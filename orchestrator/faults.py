"""What can go wrong on the way to an actor, and how a run ends.

RunError                 the run ends, the text is the last line of its log
  Refused                nothing was started; a setting or a path is to be changed first
  ActorLost              the process died or its node did; the supervisor restarts it
    ActorGone            it will not come back: its constructor failed
  DeadlinePassed         nothing came back in time; the text says who was to answer and what
"""


class RunError(Exception):
    """The run cannot go on; the text says what, which value, the limit and the remedy."""


class Refused(RunError):
    """The run cannot begin; nothing was started, nothing is left behind."""


class ActorLost(RunError):
    """The actor's process is gone, or restarting; the call may or may not have been executed."""


class ActorGone(ActorLost):
    """The actor is not restarted any more, mostly because its constructor raises."""


class DeadlinePassed(RunError):
    """An actor did not answer in time."""


class RestartBudget:
    """How many restarts of actors a run may spend, all actors together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.spent = 0

    def spend(self, why: str) -> None:
        """Count one; raises `RunError` beyond the limit."""
        self.spent += 1
        if self.spent > self.limit:
            raise RunError(
                f"{self.spent} actors were lost, run.max_restarts allows {self.limit}; "
                f"the last one: {why}"
            )
