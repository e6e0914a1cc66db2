"""Gymnasium environments that no registry knows: text spaces, ansi drawing, numbers,
and mistakes."""

from typing import Any, ClassVar

import gymnasium
from gymnasium import spaces


class Reverse(gymnasium.Env[str, str]):
    """Say a word backwards; `Text` in and out."""

    def __init__(self, letters: str = "abcde") -> None:
        self.observation_space = spaces.Text(20)
        self.action_space = spaces.Text(10, charset=frozenset(letters))
        self._letters = list(letters)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        """A word of five letters."""
        super().reset(seed=seed)
        self._word = "".join(self.np_random.choice(self._letters, 5))
        return self._word, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Right or wrong."""
        right = action == self._word[::-1]
        return ("yes" if right else "no"), float(right), right, False, {}


class Coin(gymnasium.Env[Any, Any]):
    """Guess a coin that is drawn as coloured text; actions start at 5."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"]}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = spaces.Box(0.0, 1.0, (1,))
        self.action_space = spaces.Discrete(2, start=5)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Toss it."""
        super().reset(seed=seed)
        self.side = int(self.np_random.integers(2))
        self.number = int(self.np_random.integers(10**6))
        return self.observation_space.sample(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Heads is 5."""
        return self.observation_space.sample(), float(action == 5 + self.side), True, False, {}

    def render(self) -> str:
        """In colours, as toy-text does."""
        return f"\x1b[41mcoin\x1b[0m {self.number}"


class Unseeded(Coin):
    """Opens otherwise each time."""

    opened: ClassVar[int] = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Not from the seed."""
        result = super().reset(seed=seed)
        Unseeded.opened += 1
        self.number = Unseeded.opened
        return result


class Mute(Coin):
    """Draws nothing."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}


class Steering(Reverse):
    """Its actions are numbers with commas."""

    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Box(0.0, 1.0, (1,))  # type: ignore[assignment]


def told(env: Any, observation: Any) -> str:
    """A description by the user."""
    return f"a coin, number {env.number}"
