"""Reads raw Amazon Reviews 2014, 2018 and 2023, prepared once by the TFDS builder in `amazon_reviews/`."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import tensorflow_datasets as tfds

from simgr_jax.data.amazon_reviews.amazon_reviews import AmazonReviews, config_name, source_of
from simgr_jax.data.amazon_reviews.releases import FIVE_CORE, RELEASES
from simgr_jax.errors import UserError

BLOCKS_AT_ONCE = 64


def read(path: Path, version: str, category: str) -> tuple[pl.DataFrame, dict[str, str]]:
    """Reads one category's reviews and item texts; the first call prepares them, under `path / "tfds"`.

    Args:
      path: the folder with the raw files under their published names, packed or not; what is missing is downloaded.
        Prepared data is used as long as the raw file is unchanged or gone.
      version: "2014", "2018" or "2023".
      category: as in the file names, e.g. "Beauty"; "Beauty_5" is its 5-core (2014, 2018). If only the 5-core is in
        the folder, "Beauty" reads it.

    Returns:
      The reviews in the file's order, repeats included (user: str, item: str, timestamp: int64, seconds), and the text
      of each item that has one.

    Raises:
      UserError: an unknown version or category; a file that is neither in the folder nor can be downloaded; a broken
        file or line; a folder that can't be written.
    """
    category = _known_category(path, str(version), category)
    reviews = pl.concat(_frames(_prepared(path, config_name(str(version), category, "reviews"))))
    texts: dict[str, str] = {}
    for frame in _frames(_prepared(path, config_name(str(version), category, "items"))):
        for item, text in frame.filter(pl.col("text") != "").iter_rows():
            texts.setdefault(item, text)  # some items are listed twice: the first stays
    return reviews.select("user", "item", "timestamp"), texts


def _known_category(path: Path, version: str, category: str) -> str:
    """The category as the builder's configs spell it, with `_5` where only the 5-core is at hand."""
    if version not in RELEASES:
        raise UserError(
            f"config.data.amazon_reviews.version: there is no Amazon Reviews {version}; use one of "
            f"{', '.join(RELEASES)}"
        )
    release = RELEASES[version]
    names = release.categories + tuple(f"{name}{FIVE_CORE}" for name in release.categories if release.five_core)
    if category not in names:
        near = difflib.get_close_matches(category, names, n=1, cutoff=0.0)[0]
        raise UserError(
            f"config.data.amazon_reviews.category: Amazon Reviews {version} has no {category!r}, the nearest is "
            f"{near!r}; use one of {', '.join(release.categories)}"
            + (", or one of these with _5" if release.five_core else "")
        )
    at_hand = (name for name in (category, category + FIVE_CORE) if name in names and _is_at_hand(path, version, name))
    return next(at_hand, category)


def _is_at_hand(path: Path, version: str, category: str) -> bool:
    builder = _builder(path, config_name(version, category, "reviews"))
    return builder.data_path.exists() or builder.builder_config.find(path) is not None


def _builder(path: Path, config: str) -> AmazonReviews:
    return AmazonReviews(config=config, data_dir=path / "tfds", file_format="array_record")


def _prepared(path: Path, name: str) -> AmazonReviews:
    """The builder with its data prepared, anew if the raw file is no longer the one it was prepared from."""
    builder = _builder(path, name)
    raw = builder.builder_config.find(path)
    if builder.data_path.exists() and (raw is None or builder.info.metadata["source"] == source_of(raw)):
        return builder
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(manual_dir=path, download_mode=tfds.GenerateMode.REUSE_CACHE_IF_EXISTS)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # TFDS prints what it does
            builder.download_and_prepare(download_config=config)
    except OSError as error:
        raise UserError(f"{path / 'tfds'}: can't be written ({error.strerror or error}); check the folder") from error
    return builder


def _frames(builder: AmazonReviews) -> Iterator[pl.DataFrame]:
    """The table in pieces, in the raw file's order."""
    for _, source in sorted(builder.as_data_source().items()):
        for start in range(0, len(source), BLOCKS_AT_ONCE):
            blocks = source.__getitems__(range(start, min(start + BLOCKS_AT_ONCE, len(source))))
            yield pl.concat(
                pl.DataFrame(
                    {
                        # TFDS hands strings over as an object array of UTF-8 bytes.
                        name: pl.Series(values.tolist(), dtype=pl.Binary).cast(pl.String)
                        if values.dtype == object
                        else values
                        for name, values in block.items()
                    }
                )
                for block in blocks
            )
