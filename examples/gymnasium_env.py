"""A gymnasium environment on a file tree: an action is a shell command, an episode begins with a rollback.

::

    with onlap.open(root) as store:
        workspace = store.workspaces.create("episodes", Path("repo"))

        def reward(workspace, ran):
            done = workspace.run(["make", "test"], capture=True).status == 0
            return (1.0 if done else 0.0), done

        env = TreeEnv(workspace, reward)
        observation, info = env.reset()
        observation, reward, terminated, truncated, info = env.step("sed -i s/1/2/ src/main.py")

``reset`` goes back to the checkpoint that the workspace stood on, in about a millisecond, however much an episode has
written. ``info["checkpoint"]`` of a step is the state before it; ``reset(options={"checkpoint": ...})`` begins there.
``fork`` gives another environment with the present state, to try several actions from one point. Every step that writes
leaves a checkpoint: ``workspace.keep(last=1000)`` at times forgets the older ones.
"""

from __future__ import annotations

import os
import string
from collections.abc import Callable
from typing import Any

import gymnasium
from gymnasium import spaces

import onlap

Reward = Callable[[onlap.Workspace, Any], tuple[float, bool]]


class TreeEnv(gymnasium.Env[dict[str, Any], str]):
    """An environment whose state is the tree of a workspace.

    Args:
        workspace: it belongs to the environment until that is closed, and stays.
        reward: called after each step with the workspace and what :meth:`onlap.Workspace.run` returned; gives the
            reward, and whether the episode has ended.
        max_steps: an episode of more steps is truncated.
        timeout: seconds for a command; a later one is killed.
        max_output: characters of the output that are observed, from its end.
        alphabet: the characters of actions and observations; in an observation, "?" stands for any other.
        isolation: as of :meth:`onlap.Workspace.run`. "none" is no sandbox: an explorer that tries commands at random
            needs "namespace" or "runtime".
    """

    def __init__(
        self,
        workspace: onlap.Workspace,
        reward: Reward,
        *,
        max_steps: int = 50,
        timeout: float = 30,
        max_output: int = 10_000,
        alphabet: str = string.printable,
        isolation: str | None = None,
    ) -> None:
        self.workspace = workspace
        self._reward = reward
        self._max_steps = max_steps
        self._timeout = timeout
        self._max_output = max_output
        self._alphabet = frozenset(alphabet) | {"?"}
        self._isolation = isolation
        self._steps = 0
        self.start = workspace.checkpoint()
        everything = "".join(sorted(self._alphabet))
        self.action_space = spaces.Text(4096, charset=everything)
        self.observation_space = spaces.Dict(
            {
                "output": spaces.Text(max_output, min_length=0, charset=everything),
                "status": spaces.Discrete(256),
            }
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode at the first checkpoint, or at ``options["checkpoint"]``."""
        super().reset(seed=seed)
        self._steps = 0
        at = self.workspace.rollback((options or {}).get("checkpoint", self.start))
        return self._observation("", 0), {"checkpoint": at.id, "changes": []}

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Run a shell command in the tree."""
        ran = self.workspace.run(
            ["sh", "-c", f"exec 2>&1\n{action}"],
            isolation=self._isolation,  # type: ignore[arg-type] # onlap checks it
            timeout=self._timeout,
            capture=True,
        )
        self._steps += 1
        reward, ended = self._reward(self.workspace, ran)
        info = {
            "checkpoint": ran.before.id,
            "changes": [(change.kind, os.fsencode(change.path)) for change in ran.changes],
            "timed_out": ran.timed_out,
        }
        observation = self._observation(ran.stdout.decode(errors="replace"), ran.status)
        return observation, float(reward), ended, self._steps >= self._max_steps and not ended, info

    def fork(self) -> TreeEnv:
        """Another environment, which begins with the present tree; close it and remove its workspace when done."""
        return TreeEnv(
            self.workspace.fork(),
            self._reward,
            max_steps=self._max_steps,
            timeout=self._timeout,
            max_output=self._max_output,
            alphabet="".join(self._alphabet),
            isolation=self._isolation,
        )

    def _observation(self, output: str, status: int) -> dict[str, Any]:
        text = "".join(c if c in self._alphabet else "?" for c in output[-self._max_output :])
        return {"output": text, "status": status}
