"""The same models in other libraries, for `experiments.benchmark` to compare with.

A peer is a module with `make_epochs(config, data)`: the ways worth trying, by name, to train for
one epoch on data `[n, 784]` of uint8. Each is a function that returns the epoch's mean loss, once
it is all computed; the fastest counts.
"""

PIXELS = 28 * 28
HIDDEN = (200, 200)  # of encoder and decoder
