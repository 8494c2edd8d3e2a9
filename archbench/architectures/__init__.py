"""One file an architecture. The file's name is the architecture's name; it exports ARCHITECTURE."""
