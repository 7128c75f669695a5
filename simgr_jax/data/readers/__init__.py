"""One module per format. Each has `files(path)`, the files it reads, and `read(path, name, ...)`, their `Dataset`."""
