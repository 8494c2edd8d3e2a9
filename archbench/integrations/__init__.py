"""Bridges to other projects' formats and tools."""
