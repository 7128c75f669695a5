"""The TFDS builder: turns raw Amazon Reviews files into ArrayRecord. Nothing here needs TensorFlow.

    AmazonReviews(config="2014_Beauty_5_reviews", data_dir=DIR, file_format="array_record")

A config names a release, a category and one of its two tables, `reviews` or `items`. `Beauty_5` is the published 5-core
of `Beauty` and shares its items. TFDS handles one record at a time, about 20,000 per second. Each record therefore
holds a block of consecutive rows in file order, with one feature per column.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import gzip
import itertools
import json
import math
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import requests
import tensorflow_datasets as tfds

from simgr_jax.data.amazon_reviews.releases import FIVE_CORE, HOST, RELEASES, Release
from simgr_jax.data.item_text import clean
from simgr_jax.errors import UserError

# Text encoders read 256 to 512 tokens, and 2000 characters are about 500 tokens. Some descriptions are whole web pages:
# the cap keeps memory and disk in proportion to the number of items.
MAX_TEXT_LENGTH = 2000

# The text fields of all three releases, in the order in which they are joined.
TEXT_FIELDS = "title brand store main_category categories category features feature description"

BLOCK_ROWS = {"reviews": 8192, "items": 512}
# TFDS holds a split in memory while writing it, and needs TensorFlow above 1 GB, so a big table becomes several splits.
# 100,000 items stay below that even if every text has the maximum length in 4-byte characters.
SPLIT_ROWS = {"reviews": 4_000_000, "items": 100_000}


@dataclasses.dataclass
class AmazonReviewsConfig(tfds.core.BuilderConfig):
    """One table of one category of one release.

    Attributes:
      release: "2014", "2018" or "2023".
      category: as in the file name; ends in `_5` for the 5-core of `reviews`.
      table: "reviews" or "items".
    """

    release: str = ""
    category: str = ""
    table: str = ""

    @property
    def url(self) -> str:
        release = RELEASES[self.release]
        if self.table == "items":
            path = release.items
        else:
            path = release.five_core if self.category.endswith(FIVE_CORE) else release.reviews
        return f"{HOST}/{path.format(category=self.category)}"

    @property
    def file_names(self) -> tuple[str, str]:
        """The published file name, and the name once unpacked."""
        name = self.url.rsplit("/", 1)[1]
        return name, name.removesuffix(".gz")

    def find(self, folder: Path) -> Path | None:
        """The raw file in the user's folder, or None."""
        return next((folder / name for name in self.file_names if (folder / name).is_file()), None)


def config_name(release: str, category: str, table: str) -> str:
    if table == "items":
        category = category.removesuffix(FIVE_CORE)
    return f"{release}_{category}_{table}"


def _configs() -> Iterator[AmazonReviewsConfig]:
    for name, release in RELEASES.items():
        for category in release.categories:
            tables = [(category, "reviews"), (category, "items")]
            if release.five_core:
                tables.append((category + FIVE_CORE, "reviews"))
            for file_category, table in tables:
                yield AmazonReviewsConfig(
                    name=config_name(name, file_category, table), release=name, category=file_category, table=table
                )


class AmazonReviews(tfds.core.GeneratorBasedBuilder):
    """Reviews (user, item, timestamp in seconds, rating) or items (item, text) of Amazon Reviews 2014, 2018 or 2023.

    The splits `part_000`, `part_001`, ... keep the raw file's order. `info.metadata["source"]` records the raw file
    they were made from (see `source_of`).
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = list(_configs())
    MANUAL_DOWNLOAD_INSTRUCTIONS = """Optional: files in the manual folder under their published names
    (reviews_Beauty_5.json.gz, meta_Beauty.json.gz, ...; without .gz if unpacked) are used instead of downloaded."""

    def _info(self) -> tfds.core.DatasetInfo:
        dtypes = {"item": np.str_, "text": np.str_}
        if self.builder_config.table == "reviews":
            dtypes = {"user": np.str_, "item": np.str_, "timestamp": np.int64, "rating": np.float32}
        columns = {name: tfds.features.Tensor(shape=(None,), dtype=dtype) for name, dtype in dtypes.items()}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(columns),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # keeps the rows in file order
            homepage="https://amazon-reviews-2023.github.io",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        config = self.builder_config
        path = _raw_file(config, dl_manager)
        self.info.metadata["source"] = source_of(path)
        with _lines(path) as lines:
            count = sum(1 for _ in lines)
        if not count:
            raise UserError(f"{path}: the file is empty; download {config.url} again")
        rows = _rows(path, config)  # the splits share one pass over the file: TFDS writes them in turn
        limit = SPLIT_ROWS[config.table]
        return {
            f"part_{part:03d}": self._generate_examples(itertools.islice(rows, limit))
            for part in range(math.ceil(count / limit))
        }

    def _generate_examples(self, rows: Iterator[tuple]) -> Iterator[tuple[int, dict[str, tuple]]]:
        """Yields blocks of rows as columns. The key is the block's number, which keeps the blocks in order."""
        size = BLOCK_ROWS[self.builder_config.table]
        names = ["item", "text"] if self.builder_config.table == "items" else ["user", "item", "timestamp", "rating"]
        for number in itertools.count():
            block = list(itertools.islice(rows, size))
            if not block:
                return
            yield number, dict(zip(names, zip(*block, strict=True), strict=True))


def source_of(path: Path) -> dict[str, Any]:
    """Identifies a raw file: data prepared from it is reused only if this is unchanged."""
    stat = path.stat()
    return {"file": path.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}


def item_text(record: dict[str, Any]) -> str:
    """An item's metadata as one line of at most `MAX_TEXT_LENGTH` characters; "" if it has no text.

    Joins title, brand (2023: store), categories, features and description, in this order, so that a cut hits the
    description first. A field of any release may be missing, None, a string, a list or a list of lists. HTML becomes
    plain text, and repeated strings appear once.
    """
    parts: dict[str, None] = {}
    for field in TEXT_FIELDS.split():
        parts.update(dict.fromkeys(map(_plain_text, _strings(record.get(field)))))
    text = ". ".join(part for part in parts if part)
    if len(text) > MAX_TEXT_LENGTH:
        text = text[: MAX_TEXT_LENGTH + 1].rpartition(" ")[0] or text[:MAX_TEXT_LENGTH]
    return text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for element in value:
            yield from _strings(element)


def _plain_text(text: str) -> str:
    # In the 2018 crawl, some titles and descriptions are page scripts. Its authors advise dropping them.
    if "getTime" in text:
        return ""
    return clean(text[: 10 * MAX_TEXT_LENGTH])


def _raw_file(config: AmazonReviewsConfig, dl_manager: tfds.download.DownloadManager) -> Path:
    """Finds the raw file in the manual folder, or downloads it.

    Raises:
      UserError: it is not in the folder and can't be downloaded.
    """
    try:
        folder = Path(dl_manager.manual_dir)
    except AssertionError:  # TFDS: the folder is missing or empty
        folder = None
    found = folder and config.find(folder)
    if found:
        return found
    try:
        # Without a network, TFDS would retry for minutes, so try first.
        requests.head(config.url, allow_redirects=True, timeout=30).raise_for_status()
        return Path(dl_manager.download(config.url))
    except (requests.RequestException, tfds.download.DownloadError) as error:
        raise UserError(
            f"{folder or 'the manual folder'}: there is no {' or '.join(config.file_names)}, and {config.url} can't be"
            f" downloaded ({type(error).__name__}); download the file elsewhere and put it in that folder"
        ) from error


@contextlib.contextmanager
def _lines(path: Path) -> Iterator[Iterator[tuple[int, bytes]]]:
    """Opens a plain or gzip file, and yields an iterator of (number, line) over the lines that are not blank.

    Recognizes gzip by its first bytes, because downloads lose their suffix.

    Raises:
      UserError: the file can't be read, or its gzip is broken.
    """
    try:
        with path.open("rb") as raw:
            is_gzip = raw.peek(2)[:2] == b"\x1f\x8b"
            stream: BinaryIO = gzip.GzipFile(fileobj=raw) if is_gzip else raw
            yield ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: broken gzip ({error}); download it again") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check the file and its permissions") from error


def _rows(path: Path, config: AmazonReviewsConfig) -> Iterator[tuple]:
    """Yields the rows of `reviews`, (user, item, timestamp, rating), or of `items`, (item, text).

    Raises:
      UserError: a line is not a record, or lacks a field.
    """
    release = RELEASES[config.release]
    is_items = config.table == "items"
    parse = _parse_python if is_items and release.items_are_python else json.loads
    row = _item_row if is_items else _review_row
    with _lines(path) as lines:
        for number, line in lines:
            try:
                record = parse(line)
                if not isinstance(record, dict):
                    raise ValueError(f"a {type(record).__name__}, not an object with fields")
                values = row(record, release)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
                what = "Python dict" if parse is _parse_python else "JSON object"
                raise UserError(
                    f"{path}:{number}: not a {what} of the {config.release} {config.table} ({error});"
                    " repair or remove the line, or download the file again"
                ) from error
            yield values


def _parse_python(line: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the 2014 metadata has invalid escapes such as "\/"
        return ast.literal_eval(line.decode("utf-8").strip())


def _review_row(record: dict[str, Any], release: Release) -> tuple[str, str, int, float]:
    timestamp = record.get(release.timestamp)
    if type(timestamp) is not int or abs(timestamp) >= 1 << 62:
        raise ValueError(f"{release.timestamp} is {timestamp!r}, not an integer timestamp")
    rating = record.get(release.rating)
    return (
        _identifier(record, release.user),
        _identifier(record, release.item),
        timestamp // release.ticks,
        float(rating) if isinstance(rating, int | float) else math.nan,
    )


def _item_row(record: dict[str, Any], release: Release) -> tuple[str, str]:
    return _identifier(record, release.item), item_text(record)


def _identifier(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError(f"{field} is {value!r}, not an identifier")
    return value
