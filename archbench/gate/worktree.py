"""Other versions of the checkout: what a ref names, what a file held then, and the tree in a folder of its own."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from archbench.errors import GateError

TIMEOUT_S = 120


def root_of(folder: Path) -> Path:
    """The top of the git checkout that a folder lies in. Raises GateError when it lies in none, or there is no git."""
    try:
        return Path(_git(folder, "rev-parse", "--show-toplevel"))
    except subprocess.CalledProcessError:
        raise GateError(
            f"{folder}: not in a git checkout; --base and timing compare two commits, run the gate inside one"
        ) from None


def commit_of(root: Path, ref: str) -> str:
    """The commit that a ref names. Raises GateError when it names none."""
    try:
        return _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    except subprocess.CalledProcessError:
        raise GateError(
            f"--base {ref}: no such commit, branch or tag here; fetch it first (git fetch origin; a shallow clone has "
            "only the newest commit)"
        ) from None


def file_at(root: Path, commit: str, path: Path) -> str | None:
    """The text of a file at a commit; None where it was not there."""
    try:
        return _git(root, "show", f"{commit}:{path.as_posix()}", strip=False)
    except subprocess.CalledProcessError:
        return None


@contextmanager
def worktree(root: Path, commit: str) -> Iterator[Path]:
    """The tree of a commit in a temporary folder, which git knows about until the end."""
    with tempfile.TemporaryDirectory(prefix="archbench-base-") as parent:
        folder = Path(parent) / "tree"
        try:
            _git(root, "worktree", "add", "--detach", "--force", str(folder), commit)
        except subprocess.CalledProcessError as error:
            said = (error.stderr or "").strip().splitlines() or ["no message"]
            raise GateError(f"{commit[:12]}: git could not check it out beside this one ({said[-1]})") from None
        try:
            yield folder
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):
                _git(root, "worktree", "remove", "--force", str(folder))


def _git(folder: Path, *words: str, strip: bool = True) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
    except FileNotFoundError:
        raise GateError("git is not installed here; --base and timing compare two commits") from None
    except subprocess.TimeoutExpired:
        raise GateError(f"git {words[0]}: no answer within {TIMEOUT_S} s") from None
    return done.stdout.strip() if strip else done.stdout
