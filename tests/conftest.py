"""Settings of the whole test session."""

import os
from pathlib import Path

import pytest
import torch

# A cache of the checkout's own: tests neither use nor fill the user's.
os.environ["ARCHBENCH_CACHE"] = str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "archbench")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def archbench_data() -> Path:
    """The folder of real data, or a skip with the reason."""
    folder = os.environ.get("ARCHBENCH_DATA")
    if not folder:
        pytest.skip("ARCHBENCH_DATA names no folder of real data (corpora/books, mbpp)")
    return Path(folder)
