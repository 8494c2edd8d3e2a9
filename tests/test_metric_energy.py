"""Energy counters, on a powercap folder and an NVML library made here; the metric, on a model that draws so much."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_subject import built, subject_of
from torch import Generator, Tensor, nn

from archbench.errors import ConfigError, UnsupportedError
from archbench.metric import Measurement, Probe
from archbench.metrics.energy import METRIC, EnergySettings
from archbench.model import Batch, Emission, FlopFormulas, Loss, ParameterGroup, Phase, SequenceModel
from archbench.power import meters, nvml, rapl
from archbench.sampling import Sampling

RANGE = 262_143_328_850


def zone(folder: Path, place: str, name: str, microjoules: int, range_uj: int = RANGE) -> Path:
    """A zone as Linux shows it: all zones side by side."""
    (folder / place).mkdir(parents=True)
    (folder / place / "name").write_text(f"{name}\n")
    (folder / place / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (folder / place / "energy_uj").write_text(f"{microjoules}\n")
    return folder / place / "energy_uj"


def draw(counter: Path, microjoules: int, range_uj: int = RANGE) -> None:
    counter.write_text(str((int(counter.read_text()) + microjoules) % (range_uj + 1)))


def test_packages_and_memory_are_added_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    counted = [
        zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000),
        zone(tmp_path, "intel-rapl:1", "package-1", 5_000_000),
        zone(tmp_path, "intel-rapl:0:2", "dram", 7_000_000),
    ]
    within = [
        zone(tmp_path, "intel-rapl:0:0", "core", 0),
        zone(tmp_path, "intel-rapl:2", "psys", 0),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    meter = rapl(tmp_path)
    before = meter.read()
    for counter in (*counted, *within):
        draw(counter, 2_000_000)
    assert meter.joules(before, meter.read()) == pytest.approx(6.0)
    assert meter.covers == "package-0, package-0 dram, package-1"


def test_a_counter_that_starts_again_is_followed(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 999_000, range_uj=999_999)
    meter = rapl(tmp_path)
    before = meter.read()
    draw(counter, 3_000, range_uj=999_999)
    assert int(counter.read_text()) == 2_000
    assert meter.joules(before, meter.read()) == pytest.approx(0.003)


def test_counters_that_cannot_be_read_have_their_true_reason(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="missing has no readable energy counter: there is no such folder"):
        rapl(tmp_path / "missing")
    zone(tmp_path / "laptop", "intel-rapl:0:0", "core", 0)
    with pytest.raises(UnsupportedError, match="no zone of a processor package"):
        rapl(tmp_path / "laptop")
    counter = zone(tmp_path / "locked", "intel-rapl:0", "package-0", 0)
    counter.unlink()
    counter.mkdir()  # root may read any file, but nobody a folder
    with pytest.raises(UnsupportedError, match=r"intel-rapl:0: Is a directory; run as root"):
        rapl(tmp_path / "locked")


class Driver:
    """NVML's C functions for one GPU."""

    def __init__(self, millijoules: int, status: int = 0) -> None:
        self.millijoules, self.status = millijoules, status

    def nvmlInit_v2(self) -> int:  # noqa: N802 (NVML's name)
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:  # noqa: N802
        return 0 if uuid == b"GPU-1" else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, energy: Any) -> int:  # noqa: N802
        ctypes.cast(energy, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.millijoules
        return self.status


def test_a_gpu_counts_millijoules() -> None:
    driver = Driver(5_000)
    meter = nvml("GPU-1", driver)
    before = meter.read()
    driver.millijoules += 1_500
    assert meter.joules(before, meter.read()) == pytest.approx(1.5)
    with pytest.raises(UnsupportedError, match="does not know the GPU GPU-2"):
        nvml("GPU-2", driver)
    with pytest.raises(UnsupportedError, match="older than Volta"):
        nvml("GPU-1", Driver(0, status=3))


def test_work_on_the_processor_asks_for_its_counters_alone(tmp_path: Path) -> None:
    found, missing = meters(torch.device("cpu"), tmp_path / "missing")
    assert found == [] and list(missing) == ["rapl"]
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    found, missing = meters(torch.device("cpu"), tmp_path)
    assert [meter.source for meter in found] == ["rapl"] and missing == {}


class Consumer(SequenceModel):
    """Draws 30 uJ a token read, 500 uJ a decode step of two tokens, and 1000 or 4000 uJ a training step of its two
    phases, whose shares are 3/4 and 1/4."""

    vocab_size = 256

    def __init__(self, counter: Path) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.counter = counter

    def flops(self) -> FlopFormulas:
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 1)

    def prefill(self, tokens: Tensor, state: Tensor) -> Tensor:
        draw(self.counter, 30 * tokens.numel())
        return state

    def decode_step(self, state: Tensor, sampling: Sampling, generator: Generator | None) -> Emission:
        draw(self.counter, 500)
        return Emission(torch.ones(len(state), 2, dtype=torch.long), torch.full((len(state),), 2), state)

    def phases(self) -> list[Phase]:
        def loss(microjoules: int, batch: Batch) -> Loss:
            draw(self.counter, microjoules)
            return Loss(self.weight.sum() * batch.tokens.shape[1])

        group = [ParameterGroup(name="all", parameters=[self.weight])]
        return [
            Phase(name="often", share=0.75, groups=group, loss=lambda batch: loss(1000, batch)),
            Phase(name="rarely", share=0.25, groups=group, loss=lambda batch: loss(4000, batch)),
        ]


def sampled(probe: Probe | Measurement) -> dict[str, float]:
    assert isinstance(probe, Probe)
    return {sample.quantity: sample.value for sample in probe.sample()}


def test_joules_per_token_of_known_work(tmp_path: Path) -> None:
    model = Consumer(zone(tmp_path, "intel-rapl:0", "package-0", 0))
    settings = EnergySettings(contexts=(8,), batches=(3,), new_tokens=4, seconds=0.05, powercap=str(tmp_path))
    probes = {dict(p.at)["work"]: p for p in METRIC.probes(subject_of(model), settings)}
    assert sampled(probes["prefill"])["energy_per_token"] == pytest.approx(30e-6)
    assert sampled(probes["decode"])["energy_per_token"] == pytest.approx(
        2 * 500e-6 / 12
    )  # two steps, 3 rows, 4 tokens
    per_step = (0.75 * 1000e-6 + 0.25 * 4000e-6) / 24
    # The last round of four steps may be begun and not ended.
    assert sampled(probes["training_step"])["energy_per_token"] == pytest.approx(per_step, rel=0.2)
    idle = sampled(probes["idle"])
    assert idle == {"power": 0.0}
    assert "gross, idle power not subtracted; rapl: package-0" in probes["idle"].protocol


def test_power_is_energy_over_time(tmp_path: Path) -> None:
    model = Consumer(zone(tmp_path, "intel-rapl:0", "package-0", 0))
    settings = EnergySettings(contexts=(8,), works=("prefill",), seconds=0.05, powercap=str(tmp_path))
    (probe,) = METRIC.probes(subject_of(model), settings)
    found = sampled(probe)
    joules = 1e-6 * int(model.counter.read_text())
    assert joules / found["power"] == pytest.approx(0.05, abs=0.03)
    assert found["energy_per_token"] == pytest.approx(30e-6)


def test_real_models_do_every_work(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    settings = EnergySettings(contexts=(16,), new_tokens=2, seconds=0.001, powercap=str(tmp_path))
    subject = built("mtp", d_model=16, n_layers=2, n_heads=1, n_future=2)
    works = {dict(p.at)["work"]: sampled(p) for p in METRIC.probes(subject, settings)}
    assert set(works) == {"prefill", "decode", "training_step", "idle"}
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    floor = METRIC.probes(built("ngram", order=2), settings)
    (missing,) = [m for m in floor if isinstance(m, Measurement) and m.quantity == "power"]
    assert missing.at["work"] == "training_step" and "learns by reading" in missing.reason


def test_without_counters_every_quantity_has_the_reason() -> None:
    subject = built("ngram", order=1)
    found = METRIC.probes(subject, EnergySettings(powercap="/nowhere/powercap"))
    assert {m.quantity for m in found if isinstance(m, Measurement)} == set(METRIC.quantities)
    assert all(
        isinstance(m, Measurement) and "/nowhere/powercap has no readable energy counter" in m.reason for m in found
    )


def test_a_context_limit_is_a_reason(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    subject = built("transformer", d_model=8, n_layers=1, n_heads=1, max_context=20)
    settings = EnergySettings(contexts=(16,), new_tokens=8, powercap=str(tmp_path))
    found = METRIC.probes(subject, settings)
    missing = [m for m in found if isinstance(m, Measurement)]
    assert {m.at["work"] for m in missing} == {"decode"}
    assert all("this model's limit is 20" in m.reason for m in missing)


@pytest.mark.parametrize(
    "bad", [{"contexts": ()}, {"works": ("sleep",)}, {"works": ()}, {"seconds": 0.0}, {"repeats": 0}]
)
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EnergySettings(**bad)
