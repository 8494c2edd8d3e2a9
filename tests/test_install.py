"""What a wheel installs works by itself: from an empty folder, with no network, in under a minute when idle."""

import os
import shutil
import site
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def namespace():
    """The words that run a command in a network namespace without any interface, or None with the reason."""
    words = ["unshare", "--map-root-user", "--net"]
    if shutil.which(words[0]) is None:
        return None, "there is no unshare command"
    done = subprocess.run([*words, "true"], capture_output=True, text=True)
    return (words, "") if done.returncode == 0 else (None, f"network namespaces are not allowed: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """`archbench run smoke` by a fresh environment's command. Dependencies are lent by the one running the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "results", "build", "*.egg-info", "dist"))
    build[-1] = source
    subprocess.run([str(word) for word in build], check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("archbench-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    target = folder / "venv/lib" / version / "site-packages"
    # --ignore-installed: else pip would first uninstall the archbench of the environment that runs the tests.
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed"]
    install += ["--prefix", folder / "venv", wheel]
    subprocess.run([str(word) for word in install], check=True, capture_output=True, text=True)
    (target / "lent.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    empty = folder / "empty"
    empty.mkdir()
    words, reason = namespace()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ARCHBENCH_DATA")}
    environment["ARCHBENCH_CACHE"] = str(folder / "cache")
    begin = time.monotonic()
    done = subprocess.run(
        [*(words or []), str(python), "-m", "archbench.cli", "run", "smoke"],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return {"done": done, "folder": empty, "seconds": time.monotonic() - begin, "namespace": words, "reason": reason}


def test_smoke_runs_from_an_empty_folder(smoke):
    done = smoke["done"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(smoke["folder"].glob("results/smoke/*.jsonl"))
    assert list(smoke["folder"].glob("results/smoke/report/*.html"))
    assert "failed" not in done.stdout


def test_smoke_needs_no_network(smoke):
    if smoke["namespace"] is None:
        pytest.skip(smoke["reason"])
    assert smoke["done"].returncode == 0


def test_smoke_is_quick(smoke):
    """Under 60 s on an idle machine of two cores; tests share theirs, so the bound here is looser."""
    assert smoke["seconds"] < 180
