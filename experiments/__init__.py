"""Experiments: absl binaries over led_jax."""

import signal
import sys

# sys.argv[0] is "-m" while `python -m` imports this package on its way to a binary. From then on
# SIGINT ends the process directly: a KeyboardInterrupt that is raised within an import may be lost.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
