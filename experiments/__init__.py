"""Experiments: absl binaries over led_jax."""

import signal
import sys

# Of a binary, which `-m` is still looking for. A KeyboardInterrupt within an import may be lost.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
