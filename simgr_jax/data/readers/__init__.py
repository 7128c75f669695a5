"""A module a format. Each has `files(path)`, the files it reads, and `read(path, name, ...)`, the `Dataset` in them."""
