import jax
import numpy as np
import pytest

from train import data as data_lib
from train.evaluation import evaluate


@pytest.fixture(scope='module')
def corpus(data):
    return data_lib.load_corpus(data)


@pytest.fixture(scope='module')
def evaluated(params, model, objective, corpus):
    """The evaluation of 7 rows in batches of this size."""
    byte_lengths = corpus.tokenizer.byte_lengths()

    def evaluated(size: int, params=params):
        batches = data_lib.heldout_batches(corpus, 16, size, max_rows=7)
        return evaluate(params, batches, byte_lengths, model, objective)

    return evaluated


def test_size_of_the_batches_does_not_matter(evaluated):
    """Nor do the rows that fill the last one up, but for the experts that they go to."""
    whole, parts = evaluated(7), evaluated(2)
    np.testing.assert_allclose(parts.bits_per_byte, whole.bits_per_byte, rtol=1e-5)
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-5)
    assert whole.load_LE.sum(axis=1).tolist() == [7 * 16 * 2] * 2
    assert parts.load_LE.sum(axis=1).tolist() == [8 * 16 * 2] * 2


def test_parameters_may_be_numpy_arrays_put_on_the_device(evaluated, params):
    """As an average of parameters is."""
    again = evaluated(7, jax.device_put(jax.tree.map(np.array, params)))
    assert (again.bits_per_byte, again.loss) == evaluated(7)[:2]
