"""Raw Amazon Reviews: prepares and reads small files in the form of the three releases."""

import functools
import gzip
import http.server
import json
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simgr_jax.data import amazon
from simgr_jax.data.amazon_reviews import AmazonReviews, amazon_reviews, item_text
from simgr_jax.errors import UserError

REVIEWS_2014 = [
    {"reviewerID": "A1", "asin": "0001", "overall": 5.0, "reviewText": 'ok\n"é"', "unixReviewTime": 1369699200},
    {"reviewerID": "A2", "asin": "B002", "overall": 1.0, "helpful": [0, 0], "unixReviewTime": 1355443200},
    {"reviewerID": "A1", "asin": "B003", "overall": 3.0, "reviewTime": "05 28, 2013", "unixReviewTime": 1369699200},
]
ITEMS_2014 = [
    {
        "asin": "0001",
        "title": 'Crème "brush" \'n go',
        "price": 9.99,
        "imUrl": "http://images/I/51L%2B.jpg",
        "related": {"also_bought": ["B003"]},
        "salesRank": {"Beauty": 402875},
        "categories": [["Beauty", "Hair Care"], ["Beauty", "Tools &amp; Accessories"]],
        "brand": "Acme",
        "description": "Soft &amp; light.<br />\n\nMade in <b>France</b>",
    },
    {"asin": "B002", "categories": [["Beauty"]]},
    {"asin": "B003", "price": None},
]
TEXTS_2014 = {
    "0001": 'Crème "brush" \'n go. Acme. Beauty. Hair Care. Tools & Accessories. Soft & light. Made in France',
    "B002": "Beauty",
}
REVIEWS_2018 = [
    {
        "overall": 5.0,
        "verified": True,
        "reviewerID": "A9",
        "asin": "B010",
        "style": {"Size:": " S"},
        "unixReviewTime": 9,
    },
    {"overall": 4.0, "reviewerID": "A8", "asin": "B011", "reviewText": "fine", "vote": "3", "unixReviewTime": 8},
]
ITEMS_2018 = [
    {
        "category": ["All Beauty", "Skin"],
        "description": ["", 'Deep <span class="a">clean</span>'],
        "title": "Soap",
        "brand": "by\n    \n    Clean Co",
        "feature": ["100% vegan"],
        "asin": "B010",
    },
    {"category": [], "title": "var aPageStart = (new Date()).getTime();", "brand": "", "asin": "B011"},
    {"category": [], "title": "Soap, listed again", "asin": "B010"},
]
TEXTS_2018 = {"B010": "Soap. by Clean Co. All Beauty. Skin. 100% vegan. Deep clean"}
REVIEWS_2023 = [
    {"rating": 5.0, "title": "Nice", "asin": "V1", "parent_asin": "P1", "user_id": "AGKH", "timestamp": 1588687728923},
    {"rating": 4.0, "title": "Ok", "asin": "V2", "parent_asin": "P1", "user_id": "AFSK", "timestamp": 999},
]
ITEMS_2023 = [
    {
        "main_category": "All Beauty",
        "title": "Herbivore Mist",
        "average_rating": 4.3,
        "features": ["Coconut"],
        "description": ["Salty sea breeze."],
        "price": None,
        "store": "Herbivore",
        "categories": [],
        "parent_asin": "P1",
    },
    {"main_category": None, "title": "No store", "store": None, "parent_asin": "P2"},
]
TEXTS_2023 = {"P1": "Herbivore Mist. Herbivore. All Beauty. Coconut. Salty sea breeze.", "P2": "No store"}

RELEASES = {
    "2014": ("Beauty_5", "reviews_Beauty_5.json", "meta_Beauty.json", REVIEWS_2014, ITEMS_2014, TEXTS_2014),
    "2018": ("All_Beauty", "All_Beauty.json", "meta_All_Beauty.json", REVIEWS_2018, ITEMS_2018, TEXTS_2018),
    "2023": ("All_Beauty", "All_Beauty.jsonl", "meta_All_Beauty.jsonl", REVIEWS_2023, ITEMS_2023, TEXTS_2023),
}
ROWS = {
    "2014": [("A1", "0001", 1369699200), ("A2", "B002", 1355443200), ("A1", "B003", 1369699200)],
    "2018": [("A9", "B010", 9), ("A8", "B011", 8)],
    "2023": [("AGKH", "P1", 1588687728), ("AFSK", "P1", 0)],
}


def write(path: Path, lines: list[str]) -> None:
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_release(folder: Path, version: str, suffix: str = ".gz") -> None:
    """Writes the two raw files of one category. The 2014 metadata is Python, not JSON."""
    _, reviews_name, items_name, reviews, items, _ = RELEASES[version]
    write(folder / f"{reviews_name}{suffix}", [json.dumps(record) for record in reviews])
    write(folder / f"{items_name}{suffix}", [(repr if version == "2014" else json.dumps)(record) for record in items])


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Downloads fail at once: nothing listens on port 1."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(amazon_reviews, "HOST", "http://127.0.0.1:1")


@pytest.mark.parametrize("suffix", [".gz", ""], ids=["gzip", "plain"])
@pytest.mark.parametrize("version", RELEASES)
def test_reads_each_release_gzipped_or_not(tmp_path, version, suffix):
    write_release(tmp_path, version, suffix)
    category, *_, texts = RELEASES[version]
    frame, item_texts = amazon.read(tmp_path, version, category)
    assert frame.columns == ["user", "item", "timestamp"]
    assert [str(dtype) for dtype in frame.dtypes] == ["String", "String", "Int64"]
    assert frame.rows() == ROWS[version]
    assert item_texts == texts


def test_the_second_call_needs_no_raw_files(tmp_path):
    write_release(tmp_path, "2014")
    first, first_texts = amazon.read(tmp_path, "2014", "Beauty_5")
    prepared = {path: path.stat().st_mtime_ns for path in (tmp_path / "tfds").rglob("*") if path.is_file()}
    amazon.read(tmp_path, "2014", "Beauty_5")
    for path in tmp_path.glob("*.gz"):
        path.unlink()
    again, again_texts = amazon.read(tmp_path, "2014", "Beauty_5")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tfds").rglob("*") if path.is_file()} == prepared
    assert again.equals(first) and again_texts == first_texts


def test_a_changed_raw_file_is_prepared_again(tmp_path):
    write_release(tmp_path, "2018")
    assert amazon.read(tmp_path, "2018", "All_Beauty")[0].height == 2
    write(tmp_path / "All_Beauty.json.gz", [json.dumps(REVIEWS_2018[1])])
    assert amazon.read(tmp_path, "2018", "All_Beauty")[0].rows() == ROWS["2018"][1:]


def test_a_category_reads_its_5_core_if_that_is_all_there_is(tmp_path):
    write_release(tmp_path, "2014")
    assert amazon.read(tmp_path, "2014", "Beauty")[0].height == 3
    write(tmp_path / "reviews_Beauty.json", [json.dumps(REVIEWS_2014[0])])
    assert amazon.read(tmp_path, "2014", "Beauty")[0].height == 1
    assert amazon.read(tmp_path, "2014", "Beauty_5")[0].height == 3


def test_rows_keep_their_order_across_blocks_and_splits(tmp_path, monkeypatch):
    monkeypatch.setitem(amazon_reviews.BLOCK_ROWS, "reviews", 3)
    monkeypatch.setitem(amazon_reviews.SPLIT_ROWS, "reviews", 7)
    monkeypatch.setattr(amazon, "BLOCKS_AT_ONCE", 2)
    write_release(tmp_path, "2023")
    rows = [(f"u{i % 5}", f"i{i}", 100 - i) for i in range(7 * 11 + 1)]
    lines = [json.dumps({"user_id": u, "parent_asin": i, "timestamp": 1000 * t, "rating": 5}) for u, i, t in rows]
    write(tmp_path / "All_Beauty.jsonl.gz", ["", *lines, "  "])
    assert amazon.read(tmp_path, "2023", "All_Beauty")[0].rows() == rows


def test_ratings_are_kept_as_array_record(tmp_path):
    write_release(tmp_path, "2014")
    amazon.read(tmp_path, "2014", "Beauty_5")
    builder = AmazonReviews(config="2014_Beauty_5_reviews", data_dir=tmp_path / "tfds", file_format="array_record")
    assert list(builder.data_path.glob("*.array_record*"))
    (record,) = builder.as_data_source("part_000")
    assert record["rating"].tolist() == [5.0, 1.0, 3.0]


def test_works_without_tensorflow(tmp_path):
    write_release(tmp_path, "2014")
    code = """
        import sys
        from pathlib import Path
        from simgr_jax.data import amazon
        frame, texts = amazon.read(Path(sys.argv[1]), "2014", "Beauty_5")
        assert frame.height == 3 and len(texts) == 2
        assert "tensorflow" not in sys.modules
    """
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], cwd=root, check=True)


class RecordingDownloads:
    """A stand-in for TFDS's download manager that records the URLs."""

    def __init__(self, folder: Path, manual_dir: Path | None):
        self.folder, self._manual_dir, self.urls = folder, manual_dir, []

    @property
    def manual_dir(self) -> Path:
        if self._manual_dir is None:
            raise AssertionError("Manual directory not enabled.")
        return self._manual_dir

    def download(self, url: str) -> Path:
        self.urls.append(url)
        path = self.folder / "renamed_download"
        write(path, [json.dumps({**REVIEWS_2014[0], **REVIEWS_2023[0]})])
        return path


@pytest.mark.parametrize(
    ("config", "address"),
    [
        ("2014_Beauty_reviews", "amazon/categoryFiles/reviews_Beauty.json.gz"),
        ("2014_Beauty_5_reviews", "amazon/categoryFiles/reviews_Beauty_5.json.gz"),
        ("2014_Beauty_items", "amazon/categoryFiles/meta_Beauty.json.gz"),
        ("2018_All_Beauty_reviews", "amazon_v2/categoryFiles/All_Beauty.json.gz"),
        ("2018_All_Beauty_5_reviews", "amazon_v2/categoryFilesSmall/All_Beauty_5.json.gz"),
        ("2018_All_Beauty_items", "amazon_v2/metaFiles2/meta_All_Beauty.json.gz"),
        ("2023_All_Beauty_reviews", "amazon_2023/raw/review_categories/All_Beauty.jsonl.gz"),
        ("2023_All_Beauty_items", "amazon_2023/raw/meta_categories/meta_All_Beauty.jsonl.gz"),
    ],
)
def test_downloads_what_the_manual_folder_lacks(tmp_path, monkeypatch, config, address):
    found = requests.Response()
    found.status_code = 200
    monkeypatch.setattr(requests, "head", lambda url, **_: found)
    (tmp_path / "unrelated.txt").touch()
    builder = AmazonReviews(config=config, data_dir=tmp_path / "tfds", file_format="array_record")
    for manual_dir in (None, tmp_path):
        downloads = RecordingDownloads(tmp_path, manual_dir)
        splits = builder._split_generators(downloads)
        assert downloads.urls == [f"{amazon_reviews.HOST}/{address}"]
        assert list(splits) == ["part_000"]
    (tmp_path / address.rsplit("/", 1)[1]).write_bytes((tmp_path / "renamed_download").read_bytes())
    downloads = RecordingDownloads(tmp_path, tmp_path)
    builder._split_generators(downloads)
    assert downloads.urls == []


def test_downloads_over_http(tmp_path, monkeypatch):
    site, folder = tmp_path / "site", tmp_path / "data"
    (site / "amazon_v2" / "categoryFilesSmall").mkdir(parents=True)
    (site / "amazon_v2" / "metaFiles2").mkdir()
    write(site / "amazon_v2/categoryFilesSmall/All_Beauty_5.json.gz", [json.dumps(r) for r in REVIEWS_2018])
    write(site / "amazon_v2/metaFiles2/meta_All_Beauty.json.gz", [json.dumps(r) for r in ITEMS_2018])

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if "AMAZON_FASHION_5" in self.path:
                self.send_error(404)
            else:
                super().do_GET()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(amazon_reviews, "HOST", f"http://127.0.0.1:{server.server_port}")
        frame, texts = amazon.read(folder, "2018", "All_Beauty_5")
        with pytest.raises(UserError, match=r"there is no AMAZON_FASHION\.json\.gz or .* \(HTTPError\)"):
            amazon.read(folder, "2018", "AMAZON_FASHION")
        (site / "amazon_v2/categoryFilesSmall/AMAZON_FASHION_5.json.gz").touch()  # found, then gone
        with pytest.raises(UserError, match=r"there is no AMAZON_FASHION_5\.json\.gz or .* \(DownloadError\)"):
            amazon.read(folder, "2018", "AMAZON_FASHION_5")
        server.shutdown()
    assert frame.rows() == ROWS["2018"]
    assert texts == TEXTS_2018


@pytest.mark.parametrize(
    ("version", "category", "message"),
    [
        (
            "2019",
            "Beauty",
            r"^config\.data\.amazon_reviews\.version: there is no Amazon Reviews 2019; use one of 2014, 2018, 2023$",
        ),
        (
            "2014",
            "Beuty",
            r"^config\.data\.amazon_reviews\.category: Amazon Reviews 2014 has no 'Beuty' \(closest match: 'Beauty'\);",
        ),
        (
            "2023",
            "All_Beauty_5",
            r"^config\.data\.amazon_reviews\.category: .* \(closest match: 'All_Beauty'\); use one of All_Beauty, Ama",
        ),
        (
            "2014",
            "Baby",
            r"data: there is no reviews_Baby\.json\.gz or reviews_Baby\.json, and .*put it in that folder$",
        ),
    ],
)
def test_unknown_or_missing_data_is_named_in_one_line(tmp_path, version, category, message):
    with pytest.raises(UserError, match=message) as error:
        amazon.read(tmp_path / "data", version, category)
    assert "\n" not in str(error.value)


def test_missing_metadata_is_named(tmp_path):
    write_release(tmp_path, "2014")
    (tmp_path / "meta_Beauty.json.gz").unlink()
    with pytest.raises(UserError, match=r"there is no meta_Beauty\.json\.gz or meta_Beauty\.json, and"):
        amazon.read(tmp_path, "2014", "Beauty_5")


GOOD = json.dumps(REVIEWS_2014[0])


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("reviews_Beauty_5.json.gz", [GOOD, GOOD[:-5]], r"reviews_Beauty_5\.json\.gz:2: not a JSON object .*; repair"),
        ("reviews_Beauty_5.json.gz", [GOOD, "", "[1, 2]"], r"\.gz:3: not a JSON object .*a list, not an object"),
        ("reviews_Beauty_5.json.gz", ['{"reviewerID": "A1"}'], r"\.gz:1: .*unixReviewTime is None"),
        ("reviews_Beauty_5.json.gz", [GOOD.replace("1369699200", "1e400")], r"\.gz:1: .*unixReviewTime is inf"),
        ("reviews_Beauty_5.json.gz", [GOOD.replace("1369699200", "9" * 30)], r"\.gz:1: .*unixReviewTime is 999"),
        ("reviews_Beauty_5.json.gz", [GOOD.replace('"A1"', "7")], r"\.gz:1: .*reviewerID is 7, not an identifier"),
        ("reviews_Beauty_5.json.gz", [GOOD.replace("0001", r"\ud83d")], r"\.gz:1: .*asin is .*, not an identifier"),
        ("reviews_Beauty_5.json.gz", ["[" * 100_000], r"\.gz:1: not a JSON object"),
        ("reviews_Beauty_5.json.gz", ["", " "], r"reviews_Beauty_5\.json\.gz: the file is empty; download http"),
        (
            "meta_Beauty.json.gz",
            ["{'asin': 'a'}", "{'asin': "],
            r"meta_Beauty\.json\.gz:2: not a Python dict .*; repair",
        ),
        ("meta_Beauty.json.gz", ["{'asin': open('x')}"], r"meta_Beauty\.json\.gz:1: not a Python dict"),
        ("meta_Beauty.json.gz", ["{'title': 'no id'}"], r"meta_Beauty\.json\.gz:1: .*asin is None"),
        ("meta_Beauty.json.gz", ["(" * 100_000], r"meta_Beauty\.json\.gz:1: not a Python dict"),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_kept(tmp_path, name, lines, message):
    write_release(tmp_path, "2014")
    write(tmp_path / name, lines)
    with pytest.raises(UserError, match=message) as error:
        amazon.read(tmp_path, "2014", "Beauty_5")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / name))
    write_release(tmp_path, "2014")  # once repaired, the same command works
    assert amazon.read(tmp_path, "2014", "Beauty_5")[0].rows() == ROWS["2014"]


def test_a_truncated_gzip_file_is_named(tmp_path):
    write_release(tmp_path, "2023")
    path = tmp_path / "All_Beauty.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"All_Beauty\.jsonl\.gz: broken gzip .*; download it again"):
        amazon.read(tmp_path, "2023", "All_Beauty")


def test_a_folder_that_cannot_hold_the_prepared_data_is_named(tmp_path):
    write_release(tmp_path, "2023")
    (tmp_path / "tfds").touch()
    with pytest.raises(UserError, match=r"tfds: can't be written"):
        amazon.read(tmp_path, "2023", "All_Beauty")


def test_long_text_is_cut_after_a_word():
    text = item_text({"title": "Brush", "description": ["hair " * 10_000]})
    assert text.startswith("Brush. hair hair") and text.endswith("hair")
    assert amazon_reviews.MAX_TEXT_LENGTH - 5 < len(text) <= amazon_reviews.MAX_TEXT_LENGTH
    assert len(item_text({"title": "x" * 5000})) == amazon_reviews.MAX_TEXT_LENGTH


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("a &lt;b&gt;bold&lt;/b&gt; &amp; more", "a bold & more"),
        ("size < 3 and > 1", "size < 3 and > 1"),
        ("<style>p {color: red}</style>x<!-- <b> no -->y<SCRIPT type='a'>f()</SCRIPT >z", "x y z"),
        ("one<br/>two\u00a0\t\nthree", "one two three"),
        ("cut emoji \ud83d!", "cut emoji !"),
    ],
)
def test_html_becomes_plain_text(html, text):
    assert item_text({"title": html}) == text


FIELD = st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=5)


# The first use of text() builds a table of all characters, which takes a second.
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(amazon_reviews.TEXT_FIELDS.split()), FIELD))
def test_any_record_gives_one_clean_line(record):
    text = item_text(record)
    assert text == " ".join(text.split())
    assert len(text) <= amazon_reviews.MAX_TEXT_LENGTH
    assert text.encode("utf-8").decode("utf-8") == text
