"""Pantry: fetch things from shelves, looking at them first. Copy it to start your own."""

from collections.abc import Iterator
from random import Random

from loopwright.envs.actions import Call
from loopwright.envs.protocol import Task
from loopwright.envs.toolenv import ToolEnv, ToolError

ITEMS = ("rice", "beans", "flour", "sugar", "salt", "oil", "tea", "honey")
SHELVES = 4


class Pantry(ToolEnv):
    """Fetch a number of one item; what else is in the basket counts against it."""

    name = "pantry"
    version = "1"
    description = "Fetch things from shelves that have to be looked at first."
    max_turns = 8

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """Even seeds are for training, odd ones held out."""
        rng = Random(f"{split}/{seed}")
        while True:
            task_seed = 2 * rng.getrandbits(40) + (split == "test")
            yield Task(
                environment=self.name,
                id=f"fetch-{task_seed:x}",
                seed=task_seed,
                split=split,
                scenario="fetch",
            )

    def start(self, task: Task) -> str:
        """Fill the shelves from the task's seed."""
        rng = Random(task.seed)
        items = rng.sample(ITEMS, SHELVES)
        self._stock = [{item: rng.randrange(3, 9)} for item in items]
        self._shelf = rng.randrange(SHELVES)
        self._item = items[self._shelf]
        self._count = rng.randrange(1, 4)
        self._basket: dict[str, int] = {}
        return f"Put {self._count} {self._item} into the basket. There are shelves 1 to {SHELVES}."

    def reward(self) -> dict[str, float]:
        """Half for the right thing, half for nothing else."""
        others = any(count for item, count in self._basket.items() if item != self._item)
        fetched = self._basket.get(self._item, 0)
        return {"fetched": float(fetched == self._count), "tidy": float(not others)}

    def solve(self) -> Iterator[Call]:
        """Look at the shelf, then take."""
        shelf = self._shelf + 1
        yield Call(name="look", arguments={"shelf": shelf})
        arguments = {"shelf": shelf, "item": self._item, "count": self._count}
        yield Call(name="take", arguments=arguments)

    def look(self, shelf: int) -> dict[str, int]:
        """What lies on a shelf, and how many.

        shelf: number of the shelf, from 1
        """
        return dict(self._at(shelf))

    def take(self, shelf: int, item: str, count: int = 1) -> str:
        """Move items from a shelf to the basket.

        shelf: number of the shelf, from 1
        item: what to take
        count: how many, at least 1
        """
        stock = self._at(shelf)
        if not 1 <= count <= stock.get(item, 0):
            raise ToolError("out_of_stock", f"shelf {shelf} has {stock.get(item, 0)} of that")
        stock[item] -= count
        self._basket[item] = self._basket.get(item, 0) + count
        return "taken"

    def _at(self, shelf: int) -> dict[str, int]:
        if not 1 <= shelf <= SHELVES:
            raise ToolError("not_found", f"there is no shelf {shelf}; there are 1 to {SHELVES}")
        return self._stock[shelf - 1]
