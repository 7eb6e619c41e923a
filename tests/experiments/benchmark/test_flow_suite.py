import importlib
from functools import partial

import jax
import numpy as np
import pytest
from support import randomise

from experiments.benchmark import flow_suite
from experiments.benchmark.peers import Stack

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.slow]

STACKS = [Stack("coupling", 2), Stack("made", 2), Stack("made", 1, sequential=True)]
LACKING = {("numpyro", "coupling"), ("distrax", "made")}


@pytest.mark.parametrize("peer", flow_suite.PEERS)
@pytest.mark.parametrize("stack", STACKS)
def test_peers_do_the_same_work(peer, stack):
    pytest.importorskip(peer)
    module = importlib.import_module(f"experiments.benchmark.peers.{peer}_flows")
    key, x = jax.random.key(0), jax.random.normal(jax.random.key(1), (3, 50))
    made = module.make_log_prob(stack, key)
    assert (made is None) == ((peer, stack.layer) in LACKING)
    if made is None:
        return
    params, log_prob = made
    ours = jax.eval_shape(lambda key: flow_suite.make_log_prob(stack, key)[0], key)
    assert num_weights(params) >= 0.9 * num_weights(ours)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(params):
        values = log_prob(params, x)
        return values.sum(), values

    of_params, values = gradient(randomise(params, 0.1))
    assert values.shape == (3,)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(of_params) if leaf.ndim > 1)


def num_weights(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))
