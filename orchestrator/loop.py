"""The loop: sampling runs ahead of training, never further than the lag bound allows.

      task stream ──▶ sample() × n ──▶ buffer ──▶ train() ──▶ trainer
                        │  ▲            │  ▲        │            │
              episodes  ▼  │ rollouts   │  │        │ step,      │ weights, through
        environment workers ⇄ engines   │  │        │ publish    │ the channel
                                  ▲     │  │        ▼            ▼
                                  └─────┼──┼──── pool.publish ◀──┘
                      admits tickets ◀──┘  └── releases them

Who unblocks whom: `sample` waits in `admit` for a ticket, which `release` frees; `train` waits in
`take` for the oldest groups, which `sample` fulfils; `release` follows `publish`, so whatever a
ticket samples is at most `max_lag` versions old when it is trained on (buffer.py). Synchronous
training is `max_lag = 0`, the same code. `room` holds as many groups as keep the engines busy.
"""

import asyncio

from loopwright.orchestrator.parts import Parts


async def train(run: Parts) -> None:
    """Train to the last step, or until asked to stop. Raises what made the run impossible, as a
    group."""
    async with asyncio.TaskGroup() as tasks:
        background = [tasks.create_task(sample(run)) for _ in range(run.samplers)]
        background.append(tasks.create_task(run.watch()))
        try:
            while (step := run.buffer.version + 1) <= run.steps:
                groups = await run.take(step)
                if groups is None:
                    break
                batch = run.batch(step, groups)
                await run.update(step, batch)
                await run.publish(step)
                await run.buffer.release(step)
                await run.record(step, groups)
                if run.evaluation_due(step):
                    await run.evaluate(step)
                if run.checkpoint_due(step):
                    await run.checkpoint(step)
        finally:
            for task in background:
                task.cancel()


async def sample(run: Parts) -> None:
    """Admit a ticket, play its group, fulfil it; for ever."""
    while True:
        async with run.room:
            ticket = await run.buffer.admit()
            group = await run.play_group(ticket)
            await run.buffer.fulfil(group)
