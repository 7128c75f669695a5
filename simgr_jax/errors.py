"""The one exception that stands for a user's mistake, and what it says of a library's."""


class UserError(Exception):
    """Bad input from the user: a file, a config key or a flag.

    The message is a single line, `WHERE: what is wrong; what to do`, where WHERE is a file (with its line or key)
    or a config key. The binaries print it on stderr and exit with code 2 (see `simgr_jax.cli`).
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def first_line(error: Exception) -> str:
    """What an exception says, without the lists that libraries put under it; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
