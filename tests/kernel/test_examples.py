"""The adapters in examples/, each with the real package that it is for."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.needs("overlay")


def run(package: str, root: Path, code: str) -> None:
    """Run a program in a process of its own: the packages configure logging and make directories."""
    if find_spec(package) is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{package} is not installed, and CI tests the examples: make test installs it", pytrace=False)
        pytest.skip(f"{package} is not installed: make test installs it")
    source = root / "repo"
    (source / "src").mkdir(parents=True)
    (source / "src/sum.py").write_text("print(1 - 1)\n")
    (source / "README").write_text("read me\n")
    head = "import os, pathlib, sys, onlap\nroot = pathlib.Path(sys.argv[1])\nos.chdir('/')\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code, root],
        env={
            "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *filter(None, sys.path)]),
            "PATH": os.environ["PATH"],
            "HOME": str(root),
            "MSWEA_SILENT_STARTUP": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=100,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 150


def test_an_agent_of_mini_swe_agent_works_in_a_workspace(root: Path) -> None:
    run(
        "minisweagent",
        root,
        """
import json
from minisweagent.agents.default import DefaultAgent
from minisweagent.models.test_models import DeterministicModel, make_output
from mini_swe_agent import WorkspaceEnvironment

commands = [
    "cat src/sum.py; pwd -P; echo $WHO",
    "sed -i 's/-/+/' src/sum.py; echo oops > README; exit 3",
    "ls nothing",
    "kill -KILL $$",
    "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; cat src/sum.py",
]
with onlap.open(root / "root", sync="none") as store:
    workspace = store.workspaces.create("w", root / "repo")
    env = WorkspaceEnvironment(workspace, env={"WHO": "me"}, cwd="src/..")
    model = DeterministicModel(outputs=[make_output("next", [{"command": command}]) for command in commands])
    templates = {"system_template": "You are on {{system}}.", "instance_template": "{{task}}"}
    agent = DefaultAgent(model, env, **templates, cost_limit=0)
    done = agent.run("Fix it.")
    assert done == {"exit_status": "Submitted", "submission": "print(1 + 1)\\n"}, done
    said = [message["content"] for message in agent.messages if message["role"] == "user"][1:]
    assert "print(1 - 1)" in said[0] and "me\\n" in said[0] and str(root / "repo") not in said[0], said
    assert "<returncode>3</returncode>" in said[1] and "<returncode>137</returncode>" in said[3], said
    assert "nothing" in said[2], said
    saved = agent.serialize()
    assert json.loads(json.dumps(saved))["info"]["config"]["environment"]["workspace"] == "w"
    assert (root / "repo/README").read_text() == "read me\\n"

    # A step can be taken back, and what is good is merged.
    made = env.execute({"command": "rm -r src"})
    assert made["extra"]["changes"] == ["D src"], made
    env.back(made["extra"]["checkpoint"])
    assert env.execute({"command": "test -d src"})["returncode"] == 0
    workspace.merge(select=["src/**"])
    assert (root / "repo/src/sum.py").read_text() == "print(1 + 1)\\n"
    assert (root / "repo/README").read_text() == "read me\\n"

    # What fails is told to the agent.
    assert "NotFound" in env.execute({"command": "true"}, cwd="none")["extra"]["exception_type"]
    late = WorkspaceEnvironment(workspace, timeout=0.2).execute({"command": "echo begun; sleep 1000"})
    assert late["returncode"] == -1 and "killed" in late["exception_info"], late
""",
    )


def test_episodes_of_gymnasium_begin_with_a_rollback(root: Path) -> None:
    run(
        "gymnasium",
        root,
        """
import warnings
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import RecordEpisodeStatistics
from gymnasium_env import TreeEnv

def reward(workspace, ran):
    fixed = workspace.run([sys.executable, "src/sum.py"], capture=True).stdout == b"2\\n"
    return (1.0 if fixed else -0.1), fixed

with onlap.open(root / "root", sync="none") as store:
    workspace = store.workspaces.create("w", root / "repo")
    # What is tried at random are commands that do nothing.
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "(?s).*Not able to test alternative render modes")
    warnings.filterwarnings("ignore", "(?s).*spec")
    checked = TreeEnv(store.workspaces.create("checked", root / "repo"), lambda *_: (0.0, False), alphabet=": ")
    check_env(checked, skip_render_check=True)

    env = RecordEpisodeStatistics(TreeEnv(workspace, reward, max_steps=3, max_output=20))
    first, info = env.reset(seed=1)
    assert first == {"output": "", "status": 0}
    seen, gained, ended, cut, info = env.step("rm README; printf '%030d\\\\377' 7; exit 4")
    assert seen == {"output": "0" * 18 + "7?", "status": 4}, seen
    assert (gained, ended, cut) == (-0.1, False, False) and info["changes"] == [("D", b"README")], info
    branch = env.unwrapped.fork()
    seen, gained, ended, cut, info = env.step("sed -i 's/-/+/' src/sum.py")
    assert (gained, ended, cut) == (1.0, True, False) and info["episode"]["l"] == 2, info
    assert seen in env.observation_space
    before = info["checkpoint"]
    env.reset()
    assert env.step("test -e README")[0]["status"] == 0
    env.reset(options={"checkpoint": before})
    for step in range(3):
        seen, _, ended, cut, _ = env.step("test -e README; echo $?; cat src/sum.py")
    assert seen["output"] == "1\\nprint(1 - 1)\\n" and (ended, cut) == (False, True), seen
    # The fork has what the first step did, and nothing of what came after.
    branch.reset()
    assert branch.step("ls")[0]["output"] == "src\\n"
    env.close()
assert (root / "repo/README").exists()
""",
    )
