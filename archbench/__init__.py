"""archbench: compares sequence-model architectures on the same data, budget and measures.

Reading results needs no torch: ``archbench.load(path)`` gives a pandas DataFrame of records.
"""

from archbench.errors import ArchbenchError
from archbench.record import Record, load

__version__ = "0.1.0"
__all__ = ["ArchbenchError", "Record", "__version__", "load"]
