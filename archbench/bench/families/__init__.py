"""One file a family of targets; a file is found by existing and exports `TARGETS`."""
