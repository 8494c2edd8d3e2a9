"""Formats of other tools, one file each, found by existing; see `archbench.export`."""
