"""A slow world for an interpreter of its own that leaks once: its process grows by `leak_mib` at
its 20th episode, unless `marker` says that this has happened before. Standard library only."""

import time
from pathlib import Path


class Leaky:
    """Three turns; the reward depends on what was said."""

    episodes = 0  # of this process
    leaked = b""

    def __init__(self, marker, leak_mib=0, pause_s=0.03):
        self._marker, self._leak_mib, self._pause_s = Path(marker), leak_mib, pause_s

    def spec(self):
        return {"name": "leaky", "version": "1", "description": "Say it.", "max_turns": 3}

    def tasks(self, split, seed):
        for number in range(10_000):
            yield {"id": f"{split}-{seed}-{number}", "seed": number, "scenario": "leaky"}

    def reset(self, task):
        Leaky.episodes += 1
        if Leaky.episodes == 20 and not self._marker.exists():
            self._marker.touch()
            Leaky.leaked = b"x" * (self._leak_mib << 20)
        self._said = ""
        return {"messages": [{"role": "user", "content": f"write {task['seed'] % 7}"}]}

    def step(self, text):
        time.sleep(self._pause_s)
        self._said += text
        return {"messages": [{"role": "user", "content": "more"}]}

    def evaluate(self):
        return {"reward": (len(self._said) * 37 % 11) / 10, "success": len(self._said) > 12}
