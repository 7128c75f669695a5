"""A TensorFlow Datasets builder for raw Amazon Reviews 2014, 2018 and 2023. It doesn't need TensorFlow."""

from simgr_jax.data.amazon_reviews.amazon_reviews import AmazonReviews, item_text

__all__ = ["AmazonReviews", "item_text"]
