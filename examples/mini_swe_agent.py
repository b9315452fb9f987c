"""mini-swe-agent in a workspace: every command of the agent is a step that can be shown and taken back.

An environment of mini-swe-agent (https://mini-swe-agent.com, version 2) has ``config``, ``execute``,
``get_template_vars`` and ``serialize``. This one runs the commands in a workspace::

    with onlap.open(root) as store:
        workspace = store.workspaces.create("issue-7", Path("repo"))
        agent = DefaultAgent(model, WorkspaceEnvironment(workspace), **templates)
        agent.run("Fix the failing test.")
        workspace.merge()          # or look at workspace.merge_plan() first

The directory is not touched before the merge. Beside the output, the trajectory says what each command changed, and
which checkpoint has the state before it.
"""

from __future__ import annotations

import os
import platform
from typing import Any

from minisweagent.exceptions import Submitted
from minisweagent.utils.serialize import recursive_merge
from pydantic import BaseModel

import onlap

# The first line of the output by which an agent says that it is done, and that the rest is its answer.
_SUBMIT = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"


class WorkspaceEnvironmentConfig(BaseModel):
    """What the caller may set.

    Attributes:
        cwd: where commands begin, relative to the top of the tree.
        env: added to the environment of this process; for a container, to that of its image.
        timeout: seconds for a command.
        isolation: as of :meth:`onlap.Workspace.run`; by default what suits the workspace's source. "none" keeps a
            mistake out of the directory, not an attack out of the machine.
    """

    cwd: str = ""
    env: dict[str, str] = {}
    timeout: float = 30
    isolation: str | None = None


class WorkspaceEnvironment:
    """An environment of mini-swe-agent on a workspace."""

    def __init__(self, workspace: onlap.Workspace, **options: Any) -> None:
        self.workspace = workspace
        self.config = WorkspaceEnvironmentConfig(**options)

    def execute(self, action: dict[str, Any], cwd: str = "") -> dict[str, Any]:
        """Run the command of an action; its output, with what it changed."""
        command = action.get("command", "")
        try:
            ran = self.workspace.run(
                ["sh", "-c", f"exec 2>&1\n{command}"],
                isolation=self.config.isolation,  # type: ignore[arg-type] # onlap checks it
                cwd=cwd or self.config.cwd,
                env=self._environment(),
                timeout=self.config.timeout,
                capture=True,
            )
        except onlap.OnlapError as error:
            return {
                "output": "",
                "returncode": -1,
                "exception_info": f"An error occurred while executing the command: {error}",
                "extra": {"exception_type": type(error).__name__, "exception": str(error)},
            }
        output = ran.stdout.decode(errors="replace")
        self._check_submitted(output, ran.status)
        late = f"The command was killed after {self.config.timeout:g} s." if ran.timed_out else ""
        return {
            "output": output,
            "returncode": -1 if ran.timed_out else ran.status,
            "exception_info": late,
            "extra": {
                "checkpoint": ran.before.id,
                "changes": [f"{change.kind} {onlap_text(change.path)}" for change in ran.changes],
            },
        }

    def back(self, checkpoint: str) -> None:
        """Take back everything since a checkpoint of the trajectory."""
        self.workspace.rollback(checkpoint)

    def get_template_vars(self, **more: Any) -> dict[str, Any]:
        """What the agent's templates may use."""
        found: dict[str, Any] = recursive_merge(
            self.config.model_dump(), platform.uname()._asdict(), dict(os.environ), more
        )
        return found

    def serialize(self) -> dict[str, Any]:
        """What a trajectory says about the environment."""
        kind = type(self)
        environment = {**self.config.model_dump(mode="json"), "workspace": self.workspace.name}
        return {
            "info": {"config": {"environment": environment, "environment_type": f"{kind.__module__}.{kind.__name__}"}}
        }

    def _environment(self) -> dict[str, str]:
        by_default = "runtime" if self.workspace.source.kind == "image" else "none"
        in_container = (self.config.isolation or by_default) == "runtime"
        return self.config.env if in_container else {**os.environ, **self.config.env}

    def _check_submitted(self, output: str, status: int) -> None:
        lines = output.lstrip().splitlines(keepends=True)
        if status == 0 and lines and lines[0].strip() == _SUBMIT:
            answer = "".join(lines[1:])
            extra = {"exit_status": "Submitted", "submission": answer}
            raise Submitted({"role": "exit", "content": answer, "extra": extra})


def onlap_text(name: str) -> str:
    """A name of a file, which need not be UTF-8, for JSON."""
    return os.fsencode(name).decode(errors="backslashreplace")
