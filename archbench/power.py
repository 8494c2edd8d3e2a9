"""Energy counters of the machine: what was drawn since some moment, in joules, where it can be read.

    rapl    Intel's and AMD's running average power limit, by Linux's powercap: processor packages, and their memory
    nvml    the total energy of one NVIDIA GPU since its driver was loaded, by the driver's own library

A RAPL counter is in microjoules, moves about once a millisecond and starts again from 0 beyond its range; a stretch may
wrap it once, so it must stay below range / power (tens of minutes at least). `intel-rapl:0` is a package,
`intel-rapl:0:1` a part of one. Counted are packages and the parts named `dram`, which lie outside; cores and graphics
lie inside a package, `psys` holds packages again, and `intel-rapl-mmio` is another door to the same counter. Since 2020
the kernel lets only root read them.

Both count the whole device, whoever uses it.

Sources: Linux, Documentation/power/powercap; NVML API reference, nvmlDeviceGetTotalEnergyConsumption (millijoules,
Volta and later).
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from archbench.errors import UnsupportedError

POWERCAP = Path("/sys/class/powercap")
Reading = Sequence[int]
"""What the counters of one meter show, in their own units."""


class Meter(ABC):
    """The counters of one source."""

    source: ClassVar[str]

    @property
    @abstractmethod
    def covers(self) -> str:
        """What is counted, for people."""

    @abstractmethod
    def read(self) -> Reading: ...

    @abstractmethod
    def joules(self, before: Reading, after: Reading) -> float:
        """The energy drawn between two readings."""


@dataclass(frozen=True)
class RaplZone:
    """One counter of powercap. It counts to `range_uj` and starts again from 0."""

    folder: Path
    name: str
    range_uj: int

    def read(self) -> int:
        return int((self.folder / "energy_uj").read_text())


@dataclass(frozen=True)
class Rapl(Meter):
    """All packages and their memory."""

    zones: tuple[RaplZone, ...]
    source: ClassVar[str] = "rapl"

    @property
    def covers(self) -> str:
        return ", ".join(zone.name for zone in self.zones)

    def read(self) -> Reading:
        return [zone.read() for zone in self.zones]

    def joules(self, before: Reading, after: Reading) -> float:
        drawn = 0
        for zone, first, last in zip(self.zones, before, after, strict=True):
            drawn += last - first if last >= first else last - first + zone.range_uj + 1
        return 1e-6 * drawn


def rapl(folder: Path = POWERCAP) -> Rapl:
    """The machine's RAPL counters.

    Raises:
        UnsupportedError: there are none, or they may not be read; the message says which.
    """
    if not folder.is_dir():
        raise UnsupportedError(f"{folder} has no readable energy counter: there is no such folder on this machine")
    zones, refused = [], []
    for place in sorted(folder.glob("intel-rapl:*")):
        try:
            name = (place / "name").read_text().strip()
            if not name.startswith("package") and name != "dram":
                continue
            zone = RaplZone(place, _full_name(place, name), int((place / "max_energy_range_uj").read_text()))
            zone.read()
        except OSError as error:
            refused.append(f"{place.name}: {error.strerror}")
        else:
            zones.append(zone)
    if not zones:
        why = f"{'; '.join(refused)}; run as root" if refused else "no zone of a processor package is in it"
        raise UnsupportedError(f"{folder} has no readable energy counter: {why}")
    return Rapl(tuple(zones))


def _full_name(place: Path, name: str) -> str:
    """`package-0`, `package-0 dram`."""
    parent = place.parent / place.name.rpartition(":")[0]
    return f"{(parent / 'name').read_text().strip()} {name}" if name == "dram" and parent.is_dir() else name


@dataclass(frozen=True)
class Nvml(Meter):
    """One GPU. `library` is the driver's, with NVML's C functions; `handle` its own name for the device."""

    library: Any
    handle: Any
    uuid: str
    source: ClassVar[str] = "nvml"

    @property
    def covers(self) -> str:
        return self.uuid

    def read(self) -> Reading:
        millijoules = ctypes.c_ulonglong()
        status = self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle, ctypes.byref(millijoules))
        if status:
            raise UnsupportedError(f"NVML does not tell this GPU's energy (status {status}): it is older than Volta")
        return [millijoules.value]

    def joules(self, before: Reading, after: Reading) -> float:
        return 1e-3 * (after[0] - before[0])


def nvml(uuid: str, library: Any = None) -> Nvml:
    """The counter of the GPU with this UUID ("GPU-..."). The library is the driver's unless one is given.

    Raises:
        UnsupportedError: the library is not there, or does not know this GPU or its energy.
    """
    if library is None:
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            raise UnsupportedError("NVML (libnvidia-ml.so.1), which comes with NVIDIA's driver, is not here") from None
    handle = ctypes.c_void_p()
    for status in (
        library.nvmlInit_v2(),
        library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)),
    ):
        if status:
            raise UnsupportedError(f"NVML does not know the GPU {uuid} (status {status})")
    meter = Nvml(library, handle, uuid)
    meter.read()
    return meter


def meters(device: torch.device, powercap: Path = POWERCAP) -> tuple[list[Meter], Mapping[str, str]]:
    """The counters that see work on `device`, and for each source that should and cannot be read the reason.

    Work on a GPU also occupies the processor, so both are given.
    """
    found: list[Meter] = []
    missing: dict[str, str] = {}
    try:
        found.append(rapl(powercap))
    except UnsupportedError as error:
        missing["rapl"] = str(error)
    if device.type == "cuda":
        try:
            found.append(nvml(f"GPU-{torch.cuda.get_device_properties(device).uuid}"))
        except UnsupportedError as error:
            missing["nvml"] = str(error)
    return found, missing
