import jax.numpy as jnp
import numpy as np
from flax import nnx

from simgr_jax.models.embed_tokens import embed_tokens

CODES = nnx.Param(jnp.arange(6.0).reshape(3, 2))
TOKENS = np.array([[0, 4, 2], [3, 1, 3]])


def test_inputs_from_the_number_of_codes_on_are_text():
    text = nnx.Param(-jnp.arange(1.0, 5.0).reshape(2, 2))
    found = embed_tokens(CODES, text, TOKENS)
    both = np.concatenate([CODES[...], text[...]])
    np.testing.assert_array_equal(found, both[TOKENS])


def test_what_only_text_has_is_zero_for_codes():
    text = nnx.Param(-jnp.arange(1.0, 9.0).reshape(2, 4))
    found = embed_tokens(CODES, text, TOKENS)
    both = np.concatenate([np.pad(CODES[...], ((0, 0), (0, 2))), text[...]])
    np.testing.assert_array_equal(found, both[TOKENS])
