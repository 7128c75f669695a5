"""Reads raw Amazon Reviews 2014, 2018 and 2023. The TFDS builder in `amazon_reviews/` prepares the files once."""

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
    """Reads one category's reviews and item texts. The first call prepares them under `path / "tfds"`.

    Args:
      path: folder of the raw files under their published names, gzipped or not; missing files are downloaded. Prepared
        data is reused while the raw file is unchanged or gone.
      version: "2014", "2018" or "2023".
      category: as in the file names, e.g. "Beauty", or "Beauty_5" for its 5-core (2014 and 2018 only). "Beauty" reads
        the 5-core if the folder holds nothing else.

    Returns:
      The reviews in file order, duplicates included, with columns user (str), item (str) and timestamp (int64 seconds);
      and the text of each item that has one, by item id.

    Raises:
      UserError: the version or category is unknown, a file is missing and can't be downloaded, a file or line is
        broken, or the folder can't be written.
    """
    category = _known_category(path, str(version), category)
    reviews = pl.concat(_frames(_prepared(path, config_name(str(version), category, "reviews"))))
    texts: dict[str, str] = {}
    for frame in _frames(_prepared(path, config_name(str(version), category, "items"))):
        for item, text in frame.filter(pl.col("text") != "").iter_rows():
            texts.setdefault(item, text)  # keeps the first text of an item that is listed twice
    return reviews.select("user", "item", "timestamp"), texts


def _known_category(path: Path, version: str, category: str) -> str:
    """Checks the category, and appends `_5` if only its 5-core is on disk."""
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
            f"config.data.amazon_reviews.category: Amazon Reviews {version} has no {category!r} (closest match: "
            f"{near!r}); use one of {', '.join(release.categories)}"
            + (", or one of these with _5" if release.five_core else "")
        )
    on_disk = (name for name in (category, category + FIVE_CORE) if name in names and _is_on_disk(path, version, name))
    return next(on_disk, category)


def _is_on_disk(path: Path, version: str, category: str) -> bool:
    builder = _builder(path, config_name(version, category, "reviews"))
    return builder.data_path.exists() or builder.builder_config.find(path) is not None


def _builder(path: Path, config: str) -> AmazonReviews:
    return AmazonReviews(config=config, data_dir=path / "tfds", file_format="array_record")


def _prepared(path: Path, name: str) -> AmazonReviews:
    """The builder with its data prepared; prepares again if the raw file has changed."""
    builder = _builder(path, name)
    raw = builder.builder_config.find(path)
    if builder.data_path.exists() and (raw is None or builder.info.metadata["source"] == source_of(raw)):
        return builder
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(manual_dir=path, download_mode=tfds.GenerateMode.REUSE_CACHE_IF_EXISTS)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # TFDS prints its progress
            builder.download_and_prepare(download_config=config)
    except OSError as error:
        raise UserError(f"{path / 'tfds'}: can't be written ({error.strerror or error}); check the folder") from error
    return builder


def _frames(builder: AmazonReviews) -> Iterator[pl.DataFrame]:
    """Yields the table in pieces, in the raw file's order."""
    for _, source in sorted(builder.as_data_source().items()):
        for start in range(0, len(source), BLOCKS_AT_ONCE):
            blocks = source.__getitems__(range(start, min(start + BLOCKS_AT_ONCE, len(source))))
            yield pl.concat(
                pl.DataFrame(
                    {
                        # TFDS returns strings as object arrays of UTF-8 bytes.
                        name: pl.Series(values.tolist(), dtype=pl.Binary).cast(pl.String)
                        if values.dtype == object
                        else values
                        for name, values in block.items()
                    }
                )
                for block in blocks
            )
