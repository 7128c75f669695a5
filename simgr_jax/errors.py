"""The exception for users' mistakes, and the text of libraries' exceptions."""


class UserError(Exception):
    """Bad input from the user: a file, a config key or a flag.

    The message is a single line, `WHERE: what is wrong; what to do`, where WHERE is a file (with its line or key)
    or a config key. The binaries print it on stderr and exit with code 2 (see `simgr_jax.cli`).
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def first_line(error: Exception) -> str:
    """The first line of an exception's message, because libraries add long lists; its type's name if that is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
