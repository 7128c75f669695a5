"""Lets Ctrl-C end `python -m simgr_jax.NAME` at once while it imports; `cli.run` sees to the rest.

Imports take seconds, and libraries swallow a KeyboardInterrupt. The package imports this module before all others, and
this module imports nothing that takes time before the signal is set: `_signal` is built in, `signal` is not.
"""

import _signal
import itertools
import sys

# While Python looks for the module, argv begins with "-m".
_IS_BINARY = sys.argv[:1] == ["-m"] and any(
    option == "-m" and module.startswith("simgr_jax.") for option, module in itertools.pairwise(sys.orig_argv)
)
if _IS_BINARY and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    # Polars installs a handler of its own when it is imported, which would swallow the signal from then on. So it is
    # imported first, while the signal waits.
    _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    import polars  # noqa: F401

    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, [_signal.SIGINT])
