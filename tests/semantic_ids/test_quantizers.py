"""k-means, residual k-means, product quantization and RQ-VAE."""

import itertools

import numpy as np
import pytest

from simgr_jax.semantic_ids import product_quantization, quality, residual_kmeans, rqvae
from simgr_jax.semantic_ids.kmeans import kmeans

RQVAE = rqvae.Options(steps=400, hidden_widths=(32,), latent_dim=16, learning_rate=3e-3, batch_size=256)


def clustered(num_items=600, dim=16, clusters=40, seed=0) -> np.ndarray:
    """Noisy clusters, and a few zero rows like those of items without text."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((clusters, dim))[rng.integers(0, clusters, num_items)]
    points += 0.2 * rng.standard_normal((num_items, dim))
    points[:7] = 0
    return points.astype(np.float32)


def relative_mse(points, reconstruction):
    return np.square(points - reconstruction).sum() / np.square(points - points.mean(0)).sum()


def squared_distances(points, centroids):
    return np.square(points[:, None].astype(np.float64) - centroids[None]).sum(-1)


FITS = {
    "residual_kmeans": residual_kmeans.fit,
    "opq": product_quantization.fit_opq,
    "pq": product_quantization.fit_pq,
    "rqvae": lambda *arguments: rqvae.fit(*arguments, RQVAE),
}


@pytest.mark.parametrize("name", FITS)
def test_fit_gives_codes_in_range_and_a_reconstruction_better_than_the_mean(name):
    points = clustered()
    codes, reconstruction = FITS[name](points, 4, 20, 0)
    assert codes.shape == (600, 4)
    assert codes.dtype == np.int32
    assert codes.min() >= 0
    assert codes.max() < 20
    assert reconstruction.shape == points.shape
    assert relative_mse(points, reconstruction) < 0.5


@pytest.mark.parametrize("name", FITS)
def test_equal_seeds_give_equal_codes_and_other_seeds_others(name):
    points = clustered()
    first, second, other = (FITS[name](points, 3, 16, seed)[0] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


@pytest.mark.parametrize("name", FITS)
def test_equal_items_get_equal_codes(name):
    codes, _ = FITS[name](clustered(), 4, 20, 0)
    assert len(np.unique(codes[:7], axis=0)) == 1


def test_kmeans_assigns_the_nearest_centroid_and_uses_every_one():
    points = clustered()
    codes, centroids = kmeans(points, 50, seed=0)
    distances = squared_distances(points, centroids)
    np.testing.assert_allclose(distances[np.arange(600), codes], distances.min(1), atol=1e-4)
    assert len(np.unique(codes)) == 50


def test_kmeans_clusters_stay_balanced_in_many_dimensions():
    """With random points as initial centroids, most of these clusters keep a single point."""
    points = np.random.default_rng(0).standard_normal((2000, 128)).astype(np.float32)
    codes, _ = kmeans(points, 64, seed=0)
    assert quality.report(codes[:, None], (64,))["perplexity"][0] > 55


def test_residual_kmeans_error_falls_with_each_level():
    points = clustered()
    errors = [relative_mse(points, residual_kmeans.fit(points, levels, 16, 0)[1]) for levels in (1, 2, 3, 4)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_residual_kmeans_reconstruction_is_the_sum_of_one_vector_per_code():
    points = clustered()
    codes, reconstruction = residual_kmeans.fit(points, 3, 8, 0)
    one_hot = np.concatenate([np.eye(8)[codes[:, level]] for level in range(3)], axis=1)
    solution, *_ = np.linalg.lstsq(one_hot, reconstruction, rcond=None)
    np.testing.assert_allclose(one_hot @ solution, reconstruction, atol=1e-4)


def test_pq_codes_are_the_nearest_centroids_of_their_slices():
    points = clustered(dim=10)
    codes, reconstruction = product_quantization.fit_pq(points, 4, 12, 0)
    start = 0
    for level, width in enumerate((3, 3, 2, 2)):
        columns = slice(start, start + width)
        centroids = np.stack(
            [reconstruction[codes[:, level] == code][0, columns] for code in np.unique(codes[:, level])]
        )
        distances = squared_distances(points[:, columns], centroids)
        chosen = np.square(points[:, columns] - reconstruction[:, columns]).sum(1)
        np.testing.assert_allclose(chosen, distances.min(1), atol=1e-4)
        start += width


def test_opq_loses_less_than_pq_where_columns_depend_on_each_other():
    rng = np.random.default_rng(0)
    scales = np.repeat([3.0, 0.1], 8)  # all the variance in the first half of the slices
    points = (rng.standard_normal((1000, 16)) * scales).astype(np.float32)
    _, plain = product_quantization.fit_pq(points, 4, 16, 0)
    _, rotated = product_quantization.fit_opq(points, 4, 16, 0)
    assert relative_mse(points, rotated) < 0.8 * relative_mse(points, plain)


def test_opq_takes_any_dimension_and_codebook_size():
    points = clustered(dim=13)
    codes, reconstruction = product_quantization.fit_opq(points, 4, 21, 0)
    assert codes.max() < 21
    assert reconstruction.shape == points.shape
    assert relative_mse(points, reconstruction) < 0.5


def test_opq_takes_fewer_items_than_dimensions():
    """Faiss alone would write beyond its memory."""
    points = np.random.default_rng(0).standard_normal((60, 120)).astype(np.float32)
    codes, reconstruction = product_quantization.fit_opq(points, 32, 16, 0)
    assert codes.shape == (60, 32) and codes.max() == 15
    assert relative_mse(points, reconstruction) < 0.5


def test_opq_rotation_has_orthonormal_rows():
    rotation = product_quantization._opq_rotation(clustered(dim=13), 4, 16, 0)
    assert rotation.shape == (12, 13)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(12), atol=1e-4)


@pytest.mark.parametrize("fit", [product_quantization.fit_pq, product_quantization.fit_opq])
def test_more_slices_than_dimensions_is_refused(fit):
    with pytest.raises(ValueError, match="3 dimensions"):
        fit(clustered(dim=3), 4, 8, 0)


@pytest.mark.slow
def test_rqvae_leaves_few_codes_dead():
    codes, _ = rqvae.fit(clustered(num_items=2000, clusters=200), 3, 64, 0, RQVAE)
    assert min(quality.report(codes, (64,) * 3)["codes_used"]) > 0.9


def test_rqvae_revives_dead_codes_onto_residuals_and_keeps_the_others():
    import jax.numpy as jnp
    from flax import nnx

    rng = np.random.default_rng(0)
    model = rqvae.RQVAE(4, 2, 8, rqvae.Options(hidden_widths=(8,), latent_dim=4), rngs=nnx.Rngs(0))
    codebooks = rng.standard_normal((2, 8, 4)).astype(np.float32)
    residuals = rng.standard_normal((2, 32, 4)).astype(np.float32)
    model.codebooks[...] = jnp.asarray(codebooks)
    uses = np.ones((2, 8), np.int32)
    uses[0, [1, 5]] = 0
    rqvae._revive(model, jnp.asarray(uses), jnp.asarray(residuals))
    revived = np.asarray(model.codebooks[...])
    np.testing.assert_array_equal(revived[uses > 0], codebooks[uses > 0])
    worst = np.argsort(-squared_distances(residuals[0], codebooks[0][uses[0] > 0]).min(1))[:2]
    np.testing.assert_allclose(revived[0, [1, 5]], residuals[0, worst], atol=1e-6)


def test_rqvae_encoder_gets_the_straight_through_gradient():
    import jax
    import jax.numpy as jnp
    from flax import nnx

    model = rqvae.RQVAE(4, 2, 8, rqvae.Options(hidden_widths=(8,), latent_dim=3), rngs=nnx.Rngs(0))
    model.codebooks[...] = jax.random.normal(jax.random.key(1), (2, 8, 3))
    x = jax.random.normal(jax.random.key(2), (16, 4))
    gradients = nnx.jit(nnx.grad(lambda m: m.loss(x, 0.0)[0]))(model)

    _, _, chosen = model.quantize(model.encoder(x))
    shift = chosen.sum(0) - model.encoder(x)  # a constant: what quantization added
    expected = nnx.jit(nnx.grad(lambda m: jnp.square(m.decoder(m.encoder(x) + shift) - x).mean()))(model)
    np.testing.assert_allclose(
        gradients.encoder.layers[0].kernel[...], expected.encoder.layers[0].kernel[...], rtol=1e-4, atol=1e-6
    )
