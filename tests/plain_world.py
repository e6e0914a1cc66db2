"""Worlds for interpreters that know nothing of Loopwright: plain data, standard library only."""

import os
import random
import time


class Echo:
    """Say a number that is told at the beginning; `done N` ends the episode."""

    def __init__(self, highest=99):
        self._highest = highest

    def spec(self):
        return {"name": "echo", "version": "1", "description": "Say it.", "max_turns": 4}

    def tasks(self, split, seed):
        rng = random.Random(f"{split}/{seed}")
        for _ in range(150):
            number = 2 * rng.randrange(10**9) + (split == "test")
            yield {"id": f"echo-{number}", "seed": number, "scenario": "echo"}

    def reset(self, task):
        self._wanted = random.Random(task["seed"]).randrange(self._highest)
        self._said = None
        tool = {"name": "done", "description": "End.", "parameters": {"type": "object"}}
        return {
            "messages": [{"role": "user", "content": f"say done {self._wanted}"}],
            "tools": [{"type": "function", "function": tool}],
        }

    async def step(self, text):  # both kinds of methods are allowed
        word, _, number = text.partition(" ")
        if word != "done" or not number.isdecimal() or not number.isascii() or len(number) > 9:
            message = {"role": "user", "content": "say done and a number"}
            return {"messages": [message], "signals": {"policy_fault/parse": 1}}
        if self._said is None:
            self._said = int(number)
        return {"messages": [], "terminated": True}

    def evaluate(self):
        right = float(self._said == self._wanted)
        return {"reward": right, "success": bool(right), "parts": {"right": right}}

    def oracle(self):
        yield f"done {self._wanted}"


class Moody(Echo):
    """Does what the action says: raise, hang, die, grow."""

    def step(self, text):
        if text == "raise":
            raise ValueError("a bad mood")
        if text == "hang":
            while True:
                time.sleep(3600)
        if text == "spin":
            while True:
                pass
        if text == "die":
            os._exit(3)
        if text == "grow":
            self._held = bytearray(b"x" * (64 << 20))
        if text == "odd":
            return {"messages": [object()]}
        if text == "pid":
            return {"messages": [{"role": "user", "content": str(os.getpid())}]}
        return {"messages": []}


class Broken:
    """Does not load."""

    def __init__(self):
        raise ImportError("no module named missing_package")
