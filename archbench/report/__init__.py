"""Reports: what the records of a run say, in tables, figures and plain words. Needs no torch."""

from archbench.report.write import ReportFiles, write_report

__all__ = ["ReportFiles", "write_report"]
