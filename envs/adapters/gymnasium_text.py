"""Adapter to Gymnasium environments that can be read and answered in words.

    [environment]
    name = "gymnasium"
    options = { id = "FrozenLake-v1", make = { is_slippery = false }, max_turns = 20 }

Observations: a `Text` space as it is; the toy-text environments in words (toy_text.py); others by
`describe = "file.py:function"`, called with the unwrapped environment and the observation, or else
by their `ansi` rendering. Actions: `Discrete`, by name (`actions`) or number, or `Text`; the policy
writes `<action>…</action>`, and the last one counts.

Reward: the return (the sum of the environment's rewards) on the scale `worth = [return of reward 0,
return of reward 1]`, clipped; solved from the return `success` on. An episode that has not ended
gets 0: where each step costs something, doing nothing would be best otherwise.

The task's seed is the seed of `reset`. By default the text of the opening decides which split a
task belongs to; `split_by = "seed"` divides the seeds instead, for environments that always open
alike. A quarter is held out either way.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from loopwright.envs.adapters import foreign
from loopwright.envs.adapters.toy_text import TOYS, Toy, best_plan
from loopwright.envs.protocol import (
    EnvError,
    EnvSpec,
    Message,
    Observation,
    Step,
    Task,
    TaskError,
    Verdict,
)
from loopwright.envs.registry import object_at

NAME = "gymnasium"
MAX_TURNS = 100  # where the environment has no limit of its own
MAX_ACTION_CHARS = 10_000
HOW = "Write your action between <action> and </action>"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class _World:
    """One Gymnasium environment and how it is read."""

    def __init__(self, gym: Any, id: str, make: Mapping[str, Any], describe: str) -> None:
        self._gym, self._id, self._make = gym, id, dict(make)
        self._varied: Mapping[str, Any] = {}
        self.env = self._made()
        self.toy: Toy | None = TOYS.get(type(self.env.unwrapped).__name__)
        self._told = object_at(describe, "describe") if describe else None
        if self.toy is not None and self._told is None:
            self._told = self.toy.describe
        self._is_text = isinstance(self.env.observation_space, gym.spaces.Text)
        if self._told is None and not self._is_text:
            if "ansi" not in self.env.metadata.get("render_modes", ()):
                raise EnvError(
                    f"gymnasium {id}: observations are {self.env.observation_space}, and it draws "
                    "no text; set options.describe = 'file.py:function'"
                )
            self._make["render_mode"] = "ansi"
            self.env = self._made()

    def open(self, seed: int) -> str:
        """Start the episode of a seed; what it shows."""
        toy = self.toy
        if toy is not None and toy.vary is not None and not set(toy.fixed_by) & set(self._make):
            self.env.close()
            self._varied = toy.vary(seed)
            self.env = self._made()
        observation, _ = self.env.reset(seed=seed)
        return self.text(observation)

    def text(self, observation: Any) -> str:
        """An observation in words."""
        if self._told is not None:
            return str(self._told(self.env.unwrapped, observation))
        return str(observation) if self._is_text else _ANSI.sub("", str(self.env.render()))

    def _made(self) -> Any:
        arguments = {**self._make, **self._varied}
        if ".py:" in self._id:
            return object_at(self._id, "gymnasium id")(**arguments)
        if ":" not in self._id and self._id not in self._gym.registry:
            raise foreign.unknown("gymnasium id", self._id, self._gym.registry)
        try:
            return self._gym.make(self._id, disable_env_checker=True, **arguments)
        except (self._gym.error.Error, TypeError, ValueError, LookupError, ImportError) as error:
            raise EnvError(f"gymnasium {self._id} refuses {arguments}: {error!r}") from error


class GymnasiumText:
    """One Gymnasium environment; implements `Env` and `TaskSource`. Raises `EnvError` for an
    unknown id, for spaces that are no text, and for options that do not fit."""

    def __init__(
        self,
        id: str,
        make: Mapping[str, Any] | None = None,
        describe: str = "",
        actions: Sequence[str] = (),
        worth: Sequence[float] = (),
        success: float | None = None,
        rules: str = "",
        max_turns: int = 0,
        split_by: str = "opening",
    ) -> None:
        """`id` is a registered id (`module:id` imports the module first) or `file.py:Class`; `make`
        goes to its constructor; `rules` is told first; `max_turns` 0 is the environment's limit."""
        if split_by not in ("opening", "seed"):
            raise EnvError(f"gymnasium split_by {split_by!r}: must be 'opening' or 'seed'")
        self._gym = foreign.imported("gymnasium", NAME, "gymnasium")
        self._id, self._split_by = id, split_by
        self._new = lambda: _World(self._gym, id, make or {}, describe)
        self._world: _World | None = self._new()
        env, toy = self._world.env, self._world.toy
        self._text_actions = isinstance(env.action_space, self._gym.spaces.Text)
        self._actions = self._named(actions or (toy.actions if toy else ()), env.action_space)
        self._low, self._high = _scale(worth or (toy.worth if toy else (0.0, 1.0)))
        self._success = success if success is not None else toy.success if toy else self._high
        self._rules = rules or (toy.rules if toy else "")
        self._key = f"{id.rpartition('/')[2]}-{foreign.content_hash(repr(make)):x}"
        limit = env.spec.max_episode_steps if env.spec is not None else None
        self.spec = EnvSpec(
            name=NAME,
            version=f"{self._gym.__version__}+{self._key}",
            description=f"Gymnasium {id}, told in words.",
            max_turns=max_turns or limit or MAX_TURNS,
        )
        self._live = self._over = False
        self._return = 0.0

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """An endless stream of the split's tasks. Raises `EnvError` if it has none."""
        world = self._new() if self._split_by == "opening" else None

        def draw(rng: Random) -> tuple[Mapping[str, Any], str]:
            number = rng.randrange(2**31)
            return {"seed": number}, world.open(number) if world is not None else str(number)

        where = f"gymnasium {self._id}"
        remedy = "; split_by = 'seed' divides the seeds" if world is not None else ""
        for origin, content in foreign.drawn_for(split, seed, where, draw, remedy=remedy):
            yield Task(
                environment=NAME,
                id=f"{self._key}-{origin['seed']}",
                seed=origin["seed"],
                split=split,
                scenario=self._id,
                payload={} if world is None else {"hash": foreign.content_hash(content)},
            )

    async def reset(self, task: Task) -> Observation:
        """Begin. Raises `TaskError` if the seed opens otherwise than when the task was drawn."""
        self._world = self._world or self._new()
        opening = self._world.open(task.seed)
        if task.payload.get("hash", foreign.content_hash(opening)) != foreign.content_hash(opening):
            raise TaskError(f"{task.id}: {self._id} opened otherwise for the same seed")
        self._live, self._over, self._return = True, False, 0.0
        actions = "" if self._text_actions else f"; actions: {', '.join(self._actions)}"
        system = f"{self._rules} {HOW}{actions}.".strip()
        opened = Message(role="user", content=opening)
        return Observation(messages=(Message(role="system", content=system), opened))

    async def step(self, action: str) -> Step:
        """One action; text that is none costs a turn and changes nothing."""
        world = self._playing()
        if self._over:
            return Step(observation=Observation(messages=()), terminated=True)
        chosen, problem = self._chosen(action, world.env.action_space)
        if problem:
            return _step(problem, signals={"policy_fault/parse": 1})
        observation, reward, terminated, truncated, _ = world.env.step(chosen)
        self._return += float(reward)
        self._over = bool(terminated or truncated)
        return _step(world.text(observation), terminated=self._over)

    async def evaluate(self) -> Verdict:
        """The return on its scale; 0 before the end."""
        self._playing()
        if not self._over:
            return Verdict(reward=0.0, success=False, parts={"return": self._return})
        scaled = (self._return - self._low) / (self._high - self._low)
        reward = min(1.0, max(0.0, scaled)) if math.isfinite(scaled) else math.nan
        solved = self._return >= self._success
        return Verdict(reward=reward, success=solved, parts={"return": self._return})

    def oracle(self) -> Iterator[str]:
        """The best plan, for toy-text environments without chance; else nothing."""
        unwrapped = self._playing().env.unwrapped
        while "P" in vars(unwrapped) and not self._over:
            plan = best_plan(unwrapped, self.spec.max_turns)
            if not plan:
                return
            yield f"<action>{self._actions[plan[0]]}</action>"

    async def close(self) -> None:
        """Close the environment. Idempotent; `reset` makes a new one."""
        if self._world is not None:
            self._world.env.close()
        self._world, self._live = None, False

    def _playing(self) -> _World:
        if self._world is None or not self._live:
            raise RuntimeError("gymnasium: no live task; call reset(task) first")
        return self._world

    def _named(self, names: Sequence[str], space: Any) -> tuple[str, ...]:
        """The names of discrete actions; none for a text space."""
        if self._text_actions:
            return ()
        if not isinstance(space, self._gym.spaces.Discrete):
            raise EnvError(f"gymnasium {self._id}: actions are {space}, expected Discrete or Text")
        first, count = int(space.start), int(space.n)
        names = tuple(names) or tuple(str(first + i) for i in range(count))
        if len(names) != count or len(set(names)) != count:
            raise EnvError(
                f"gymnasium actions {list(names)}: expected {count} different names, one for each "
                f"of {space}"
            )
        return names

    def _chosen(self, text: str, space: Any) -> tuple[Any, str]:
        """The action, or what is wrong with the text."""
        _, opened, rest = text.rpartition("<action>")
        action, closed, _ = rest.partition("</action>")
        action = action.strip()
        if not opened or not closed or len(action) > MAX_ACTION_CHARS:
            return None, f"{HOW}."
        if self._text_actions:
            limits = f"{space.min_length} to {space.max_length} of its characters"
            return action, "" if space.contains(action) else f"That is no action: write {limits}."
        if action.lower() in self._actions:
            return int(space.start) + self._actions.index(action.lower()), ""
        if action in self._actions:
            return int(space.start) + self._actions.index(action), ""
        return None, f"That is no action. Actions: {', '.join(self._actions)}."


def _scale(worth: Sequence[float]) -> tuple[float, float]:
    values = [float(value) for value in worth]
    if len(values) != 2 or not all(map(math.isfinite, values)) or values[0] >= values[1]:
        raise EnvError(f"gymnasium worth {list(worth)}: expected [return of 0, return of 1]")
    return values[0], values[1]


def _step(text: str, *, terminated: bool = False, signals: Mapping[str, int] | None = None) -> Step:
    observation = Observation(messages=(Message(role="user", content=text),))
    return Step(observation=observation, terminated=terminated, signals=signals or {})
