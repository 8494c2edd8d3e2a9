"""Somebody else's package gets the same treatment: found by entry point, checked, trained, measured, reported.

The package is a GRU in one file. Adding it touches no file of ours.
"""

import os
import subprocess
import sys

import pytest

GRU = '''
"""A gated recurrent unit as a language model. Source: Cho et al. 2014, eqs. 5 to 8 (torch.nn.GRU)."""

from dataclasses import dataclass

import torch
from torch import nn

from archbench.model import Architecture, AutoregressiveModel, Traits


@dataclass(frozen=True, kw_only=True)
class GRUConfig:
    vocab_size: int
    d_model: int = 32


class GRU(AutoregressiveModel):
    def __init__(self, config, generator=None):
        super().__init__()
        self.config, self.vocab_size = config, config.vocab_size
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.gru = nn.GRU(config.d_model, config.d_model, batch_first=True)
        self.unembedding = nn.Linear(config.d_model, config.vocab_size)
        if self.embedding.weight.device.type != "meta":
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.1, generator=generator)

    def initial_layers(self, batch_size):
        return torch.zeros(batch_size, self.config.d_model)

    def hidden(self, tokens, layers):
        out, last = self.gru(self.embedding(tokens), layers[None].to(tokens.device))
        return out, last[0]

    def logits(self, hidden):
        return self.unembedding(hidden)

    def hidden_flops(self, n, context, causal):
        return 12.0 * n * self.config.d_model**2

    def logits_flops(self):
        return 2.0 * self.config.d_model * self.vocab_size


ARCHITECTURE = Architecture(
    config=GRUConfig,
    build=GRU,
    traits=lambda config: Traits(likelihood=True, constant_state=True),
    paper="Cho et al. 2014, 1406.1078",
    candidates=lambda vocab_size: (GRUConfig(vocab_size=vocab_size, d_model=d) for d in range(8, 1025, 8)),
)
'''

SUITE = """
size: nano
training: {budget: {bytes: 40_000}, context: 32, batch: 8, learning_rate: 1e-2, precision: fp32}
cells:
  - architecture: gru
  - architecture: transformer
metrics:
  training: {}
  likelihood: {max_bytes: 4096}
  latency: {contexts: [32], batches: [1], new_tokens: 2, repeats: 2}
"""


@pytest.fixture
def installed(tmp_path):
    """A folder that is what `pip install` of the package would leave, and an environment that sees it."""
    site = tmp_path / "site"
    info = site / "archbench_gru-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "archbench_gru.py").write_text(GRU)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: archbench-gru\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[archbench.architectures]\ngru = archbench_gru:ARCHITECTURE\n")
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "160"}


def archbench(environment, cwd, *words):
    command = [sys.executable, "-m", "archbench.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)


def test_a_third_party_architecture_passes_the_conformance_check(installed, tmp_path):
    done = archbench(installed, tmp_path, "check", "gru")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "broken" not in done.stdout


def test_a_third_party_architecture_is_listed_and_run_like_ours(installed, tmp_path):
    assert "gru" in archbench(installed, tmp_path, "list", "architectures").stdout
    (tmp_path / "mine.yaml").write_text(SUITE)
    done = archbench(installed, tmp_path, "run", "mine.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 ok" in done.stdout
    table = (tmp_path / "results/mine/report").glob("*.md")
    assert "gru" in next(table).read_text()


def test_a_file_that_is_not_installed_is_checked_by_its_path(tmp_path):
    (tmp_path / "mine.py").write_text(GRU)
    done = archbench({**os.environ, "COLUMNS": "160"}, tmp_path, "check", "mine.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_broken_architecture_fails_the_check(tmp_path):
    leaking = GRU.replace("out, last = ", "tokens = tokens.flip(1); out, last = ")
    (tmp_path / "leaking.py").write_text(leaking)
    done = archbench({**os.environ, "COLUMNS": "160"}, tmp_path, "check", "leaking.py")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "broken" in done.stdout
