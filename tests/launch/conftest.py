"""A checkout with a space in its path, and recording stand-ins for the tools that the launch scripts call."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

# The only real tools that the scripts under test can find, so that no test reaches a cloud tool of this machine.
TOOLS = (
    "bash", "cat", "chmod", "cp", "date", "dirname", "env", "flock", "git", "gzip", "id", "kill", "mkdir", "mv", "rm",
    "sed", "setpriv", "setsid", "sh", "sleep", "tail", "tar", "true",
)  # fmt: skip

RECORD = """#!{python} -IS
import json, os, sys
with open({log!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""

# Arguments that must arrive unchanged through any number of shells.
HARD_ARGUMENTS = (
    "--config=configs/llm.py:full",
    "--workdir=/mnt/bucket/a run",
    "--config.prompt.item=\n{title} {codes}",
    "--config.prompt.history=\t{items}\n\n$(HOME) $$ $$(HOME)\r",
    'it\'s "quoted" `id` $HOME ${HOME} $(id) $$ $(HOME) \\n \\',
    "  two  spaces  ",
    "*?[a-z]~ #! ; & | < > (x) {a,b} !! %s %20",
    "ähnlich 商品 \x7f\x1b",
    "",
    "-",
)


@dataclass
class Launch:
    """A checkout of the launch scripts, and the tools that they find.

    Attributes:
      root: the checkout.
      bin: the folder of the stand-ins, which comes before TOOLS in the PATH.
      path: the scripts' PATH.
    """

    root: Path
    bin: Path
    path: str

    @property
    def log(self) -> Path:
        return self.bin.parent / "calls.jsonl"

    def record(self, *names: str, then: str = "") -> None:
        """Makes stand-ins that record their argv and then run `then` (Python; `sys`, `os` and `json` are imported)."""
        for name in names:
            file = self.bin / name
            file.write_text(RECORD.format(python=sys.executable, log=str(self.log)) + then)
            file.chmod(0o755)

    def calls(self) -> list[list[str]]:
        """The argv of each call so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def env(self) -> dict[str, str]:
        return {"PATH": self.path, "HOME": str(self.root.parent), "LC_ALL": "C.UTF-8", "TMPDIR": str(self.root.parent)}

    def __call__(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs launch/SCRIPT from outside the checkout."""
        command = [str(self.root / "launch" / script), *arguments]
        return subprocess.run(command, env=self.env(), cwd="/", capture_output=True, text=True, timeout=60)

    def bash(self, line: str) -> None:
        subprocess.run(["bash", "-c", line], env=self.env(), cwd="/", check=True, capture_output=True, timeout=60)


@pytest.fixture
def launch(root: Path, tmp_path: Path) -> Launch:
    checkout = tmp_path / "a checkout"
    shutil.copytree(root / "launch", checkout / "launch")
    tools, stubs = tmp_path / "tools", tmp_path / "stubs"
    for folder in (tools, stubs):
        folder.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name))
    return Launch(checkout, stubs, f"{stubs}:{tools}")


@pytest.fixture(scope="session")
def hard_arguments() -> Sequence[str]:
    return HARD_ARGUMENTS


@pytest.fixture(scope="session")
def expanded_by_kubernetes() -> Callable[[str], str]:
    """A function from a word of a container's command to the word that its bash receives.

    $$ is an escaped $, and $(NAME) is the container's variable NAME:
    https://kubernetes.io/docs/tasks/inject-data-application/define-command-argument-container
    """
    return lambda word: re.sub(r"\$\$|\$\([^)]*\)", lambda found: "$" if found[0] == "$$" else "REPLACED", word)


@pytest.fixture
def same_when_printed(launch) -> Callable[..., None]:
    """A function that asserts that --dry_run prints exactly the commands that a script would otherwise call."""

    def check(script: str, *arguments: str) -> None:
        before = len(launch.calls())
        assert launch(script, *arguments).returncode == 0
        called = launch.calls()[before:]
        end = arguments.index("--") if "--" in arguments else len(arguments)
        printed = launch(script, *arguments[:end], "--dry_run", *arguments[end:])
        assert printed.returncode == 0
        assert launch.calls()[before:] == called, "--dry_run must not call anything"
        launch.bash(printed.stdout)
        assert launch.calls()[before + len(called) :] == called
        assert called

    return check
