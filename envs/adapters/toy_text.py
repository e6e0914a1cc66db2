"""Gymnasium's toy-text environments in words: what the policy reads, what its actions are called,
and what a return is worth. Pure functions of the environment and its observation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

COMPASS = ("left", "down", "right", "up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    """How one of them is told."""

    rules: str
    actions: tuple[str, ...]
    describe: Callable[[Any, Any], str]  # (unwrapped environment, observation) → text
    worth: tuple[float, float]  # returns that are rewards 0 and 1
    success: float  # the return from which an episode counts as solved
    # the constructor's arguments of a task, drawn from its seed, unless the user fixes them
    vary: Callable[[int], Mapping[str, Any]] | None = None
    fixed_by: tuple[str, ...] = field(default=())


def _place(index: int, columns: int) -> str:
    return f"row {index // columns}, column {index % columns}"


def _lake(env: Any, observation: Any) -> str:
    row, column = divmod(int(observation), env.ncol)
    lines = [[cell.decode() for cell in line] for line in env.desc]
    standing_on = lines[row][column]
    lines[row][column] = "*"
    shown = "\n".join("".join(line) for line in lines)
    return f"{shown}\nYou are the *, on {standing_on}."


def _lake_of(seed: int) -> Mapping[str, Any]:
    from gymnasium.envs.toy_text.frozen_lake import generate_random_map

    return {"desc": generate_random_map(size=4, p=0.7, seed=seed)}


def _cliff(env: Any, observation: Any) -> str:
    return f"You are at {_place(int(observation), 12)}; the goal is at {_place(47, 12)}."


_STANDS = ("red", "green", "yellow", "blue")


def _taxi(env: Any, observation: Any) -> str:
    row, column, passenger, goal = env.decode(int(observation))
    lines = ["".join(c.decode() for c in line) for line in env.desc]
    line = lines[row + 1]
    lines[row + 1] = line[: 2 * column + 1] + "*" + line[2 * column + 2 :]
    places = [_place(5 * r + c, 5) for r, c in env.locs]
    where = f"waits at {_STANDS[passenger]} ({places[passenger]})" if passenger < 4 else "is inside"
    return (
        "\n".join(lines)
        + f"\nYour taxi is the *, at row {row}, column {column}. The passenger {where} and "
        f"wants to go to {_STANDS[goal]} ({places[goal]})."
    )


def _blackjack(env: Any, observation: Any) -> str:
    total, dealer, ace = (int(value) for value in observation)
    usable = ", with an ace that counts 11" if ace else ""
    card = "an ace" if dealer == 1 else f"a {dealer}"
    return f"You hold {total}{usable}. The dealer shows {card}."


# By the name of the class.
TOYS: Mapping[str, Toy] = MappingProxyType(
    {
        "FrozenLakeEnv": Toy(
            rules="Cross the frozen lake from S to G. F is ice, H is a hole that ends the trip.",
            actions=COMPASS,
            describe=_lake,
            worth=(0.0, 1.0),
            success=1.0,
            vary=_lake_of,
            fixed_by=("desc", "map_name"),
        ),
        "CliffWalkingEnv": Toy(
            rules="Walk on a grid of 4 rows and 12 columns. Row 3 between columns 1 and 10 is a "
            "cliff: stepping there costs 100 and puts you back at the start. A step costs 1.",
            actions=("up", "right", "down", "left"),
            describe=_cliff,
            worth=(-100.0, -13.0),
            success=-13.0,
        ),
        "TaxiEnv": Toy(
            rules="Drive to the passenger, pick up, drive to the destination, drop off. | is a "
            "wall, : none. A step costs 1, a wrong pickup or dropoff 10; the right dropoff "
            "pays 20.",
            actions=("south", "north", "east", "west", "pickup", "dropoff"),
            describe=_taxi,
            worth=(-30.0, 3.0),  # 3: the best return of the task that is farthest
            success=-30.0,  # delivered at all, within fifty steps
        ),
        "BlackjackEnv": Toy(
            rules="Come closer to 21 than the dealer without going beyond. The dealer draws up "
            "to 17.",
            actions=("stick", "hit"),
            describe=_blackjack,
            worth=(-1.0, 1.0),
            success=1.0,
        ),
    }
)


def best_plan(env: Any, most: int) -> list[int]:
    """The actions of the best return from where a tabular environment is, by label-correcting
    search over its transitions; empty if chance takes part or no end is within `most` steps."""
    table = env.P
    if any(len(outcomes) != 1 for acts in table.values() for outcomes in acts.values()):
        return []
    frontier: dict[int, tuple[float, list[int]]] = {int(env.s): (0.0, [])}
    known = {state: total for state, (total, _) in frontier.items()}
    best: tuple[float, list[int]] | None = None
    for _ in range(most):
        reached: dict[int, tuple[float, list[int]]] = {}
        for state, (total, plan) in frontier.items():
            for action, [(_, after, reward, ends)] in table[state].items():
                gained, longer = total + float(reward), [*plan, action]
                if ends:
                    best = (gained, longer) if best is None or gained > best[0] else best
                elif gained > known.get(int(after), -float("inf")):
                    known[int(after)] = gained
                    reached[int(after)] = (gained, longer)
        frontier = reached
    return best[1] if best else []
