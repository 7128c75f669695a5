"""The raw Amazon Reviews releases of 2014, 2018 and 2023 as a TensorFlow Datasets builder (without TensorFlow)."""

from simgr_jax.data.amazon_reviews.amazon_reviews import AmazonReviews, item_text

__all__ = ["AmazonReviews", "item_text"]
