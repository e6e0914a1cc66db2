"""Rules of how an environment plays: steps, grades, budgets, reuse, sessions side by side."""

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from loopwright.envs.conformance.kit import Kit, replies, shown, texts, transcript
from loopwright.envs.conformance.noise import RandomPolicy
from loopwright.envs.protocol import Message, Observation, Snapshots, Step, Task, Verdict
from loopwright.envs.registry import Environment

ROLES = ("system", "user", "assistant", "tool")
SESSIONS = 8
POLICIES = 5
_RANDOM_TURNS = 12


async def determinism(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """The same task and actions give the same observations and verdict (unless declared
    otherwise)."""
    env = kit.make()
    if not env.spec.deterministic:
        return
    for task in kit.tasks:
        actions, _ = await kit.oracle(task)
        for played in (actions, kit.noise(task, 5)[-5:]):
            first = await transcript(env, task, played)
            if not _same(first, await transcript(kit.make(), task, played)):
                yield task.id, "the same actions gave other observations or another verdict"
                break


async def oracle_solves(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """The oracle, where there is one, reaches reward 1 and success."""
    for task in kit.tasks:
        actions, verdict = await kit.oracle(task)
        if actions and not (verdict.success and verdict.reward >= 0.999):
            yield task.id, f"the oracle reached {verdict.reward}, success {verdict.success}"


async def idle_fails(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """Doing nothing is no success."""
    env = kit.make()
    for task in kit.tasks:
        await env.reset(task)
        if (await env.evaluate()).success:
            yield task.id, "doing nothing counts as success"


async def random_fails(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """Acting at random does not succeed more often than not."""
    actions = {task.id: (await kit.oracle(task))[0] for task in kit.tasks}
    env, solved = kit.make(), list[Task]()
    for task in kit.tasks:
        elsewhere = [a for other, said in actions.items() if other != task.id for a in said]
        for number in range(POLICIES):
            verdict = await play_randomly(env, task, f"random/{kit.seed}/{number}", elsewhere)
            solved += [task] if verdict.success else []
    if len(solved) > len(kit.tasks) * POLICIES // 2:
        share = len(solved) / (len(kit.tasks) * POLICIES)
        yield solved[0].id, f"policies that act at random succeed in {share:.0%} of the episodes"


async def play_randomly(
    env: Environment, task: Task, seed: str, elsewhere: Sequence[str] = ()
) -> Verdict:
    """The grade of a policy that acts at random; `elsewhere`: what was right for other tasks."""
    policy = RandomPolicy(seed, await env.reset(task), elsewhere)
    for _ in range(min(env.spec.max_turns, _RANDOM_TURNS)):
        if (await env.step(policy.act())).terminated:
            break
    return await env.evaluate()


async def budget(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """The oracle needs no more turns than declared, and an episode cut off by its budget is
    graded."""
    env = kit.make()
    for task in kit.tasks:
        actions, _ = await kit.oracle(task)
        await env.reset(task)
        most = env.spec.max_turns
        if len(actions) > most:
            yield task.id, f"the oracle took {len(actions)} turns, max_turns is {most}"
        for action in kit.noise(task, most)[-most:]:
            if (await env.step(action)).terminated:
                break
        try:
            await env.evaluate()
        except Exception as error:  # noqa: BLE001 - the rule is that nothing is raised
            yield task.id, f"evaluate() of an episode that its budget cut off raised {error!r}"


async def survives_text(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """Any text gives a step, never an exception."""
    env = kit.make()
    for task in kit.tasks:
        await env.reset(task)
        for action in kit.noise(task, 300 if kit.full else 30):
            said = ascii(action[:40])
            try:
                step: object = await env.step(action)
            except Exception as error:  # noqa: BLE001 - the rule is that nothing is raised
                yield task.id, f"step({said}) raised {error!r}"
                return
            if not isinstance(step, Step):
                yield task.id, f"step({said}) gave a {type(step).__name__}"
                return
            if step.terminated:
                await env.reset(task)


async def messages(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """An episode opens with a message; all are encodable text in a known role."""
    env = kit.make()
    for task in kit.tasks:
        opening: object = await env.reset(task)
        if not isinstance(opening, Observation):
            yield task.id, f"reset gave a {type(opening).__name__}, expected an Observation"
            return
        seen: list[Message] = list(opening.messages)
        if not seen:
            yield task.id, "reset gave no message"
        for action in kit.noise(task, 10):
            step = await env.step(action)
            seen += step.observation.messages
            if step.terminated:
                break
        for message in seen:
            if message.role not in ROLES:
                yield task.id, f"role {message.role!r} is none of {', '.join(ROLES)}"
            try:
                message.content.encode()
            except (UnicodeEncodeError, AttributeError):
                yield task.id, f"content is not encodable text: {ascii(message.content)[:60]}"


async def signals(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """Signals are names with counts."""
    env = kit.make()
    for task in kit.tasks:
        actions, _ = await kit.oracle(task)
        for played in (actions, kit.noise(task, 10)):
            await env.reset(task)
            for action in played:
                step = await env.step(action)
                counts: Mapping[Any, Any] = step.signals
                for name, count in counts.items():
                    if not isinstance(name, str) or type(count) is not int or count < 0:
                        yield task.id, f"signal {name!r} is {count!r}, expected a name and a count"
                        return
                if step.terminated:
                    break


async def evaluate_idempotent(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """Grading changes nothing, whenever and however often it is done."""
    for task in kit.tasks:
        actions, plain = await kit.oracle(task)
        env = kit.make()
        await env.reset(task)
        for action in actions:
            if not _same(await env.evaluate(), await env.evaluate()):
                yield task.id, "two evaluations in a row differ"
                break
            await env.step(action)
        if not _same(await env.evaluate(), plain):
            yield task.id, "evaluating between the steps changed the final verdict"


async def reward_range(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """Reward and parts are finite numbers, success is true or false."""
    env = kit.make()
    for task in kit.tasks:
        for actions in ([], kit.noise(task, 3)[-3:]):
            verdict: object = (await transcript(env, task, actions))[-1]
            if not isinstance(verdict, Verdict):
                yield task.id, f"evaluate() gave a {type(verdict).__name__}, expected a Verdict"
                return
            for name, value in {"reward": verdict.reward, **verdict.parts}.items():
                if not isinstance(value, int | float) or not math.isfinite(value):
                    yield task.id, f"{name} is {value!r}, must be a finite number"
            success: object = verdict.success
            if success is not True and success is not False:
                yield task.id, f"success is {success!r}, must be True or False"


async def starts_over(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """A used instance plays a task as a new one does."""
    for task in kit.tasks:
        actions, _ = await kit.oracle(task)
        fresh = await transcript(kit.make(), task, actions)
        env = kit.make()
        for other in kit.tasks[:2]:
            await transcript(env, other, (await kit.oracle(other))[0])
        if not _same(await transcript(env, task, actions), fresh):
            yield task.id, "a used instance plays the task differently from a new one"


async def interleaved(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """Sessions of one task, side by side, know nothing of each other."""
    for task in kit.tasks[:2]:
        actions, _ = await kit.oracle(task)
        alone = await transcript(kit.make(), task, actions)
        envs = [kit.make() for _ in range(SESSIONS)]
        logs: list[list[Any]] = [[texts(await env.reset(task))] for env in envs]
        for index in range(len(alone) - 2):  # the opening and the verdict are no actions
            for env, log in zip(envs, logs, strict=True):
                log.append(shown(await env.step(actions[index])))
        for env, log in zip(envs, logs, strict=True):
            log.append(await env.evaluate())
        differing = sum(not _same(log, alone) for log in logs)
        if differing:
            yield task.id, f"{differing} of {SESSIONS} interleaved sessions differ from one alone"


async def ends(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """After the end an action changes nothing; `close` may be called twice, and `reset` after
    it."""
    for task in kit.tasks:
        env = kit.make()
        actions, verdict = await kit.oracle(task)
        await transcript(env, task, actions)
        await env.step(actions[-1] if actions else "")
        if actions and not (await env.evaluate()).success and verdict.success:
            yield task.id, "an action after the end changed the verdict"
        for call in (env.close, env.close, lambda env=env, task=task: env.reset(task)):
            try:
                await call()
            except Exception as error:  # noqa: BLE001 - the rule is that nothing is raised
                yield task.id, f"close(), close(), reset(task) raised {error!r}"
                return


async def snapshots(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """Where declared: from a snapshot the episode goes on as it did, in the same instance and in
    another one."""
    for task in kit.tasks:
        env = kit.make()
        await env.reset(task)
        if not env.spec.snapshots or not isinstance(env, Snapshots):
            continue
        actions, _ = await kit.oracle(task)
        for at in sorted({0, len(actions) // 2, len(actions)}):
            await env.reset(task)
            await replies(env, actions[:at])
            graded = await env.evaluate()
            blob: object = await env.snapshot()
            if not isinstance(blob, bytes):
                yield task.id, f"snapshot() gave a {type(blob).__name__}, expected bytes"
                return
            rest: list[Any] = [await replies(env, actions[at:]), await env.evaluate()]
            for name, other in (("the same instance", env), ("another instance", kit.make())):
                assert isinstance(other, Snapshots)
                await other.restore(task, blob)
                again: list[Any] = [await other.evaluate()]
                again += [await replies(other, actions[at:]), await other.evaluate()]
                if not _same(again, [graded, *rest]):
                    yield task.id, f"restored after {at} turns, {name} goes on differently"


def _same(left: Any, right: Any) -> bool:
    """Equality that takes NaN for equal to itself: that is the rule `reward_range`'s to find."""
    return left == right or repr(left) == repr(right)
