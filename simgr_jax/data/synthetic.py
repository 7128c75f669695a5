"""Synthetic data: a small shop whose true next-item distribution p(i | history) is known.

Every item is a product ("whisk", "printer") of a category, made by a brand, in one of the brand's lines and in one
material. Its title names all of these. Materials and adjectives only tell items apart: they don't affect what users
buy. The products form a ring, each followed by what people buy next (a printer, then ink cartridges), and the last
products of a category lead to the next category. Popularity has a long tail (a shifted Zipf law).

A user's next item is drawn from a mixture that depends on the history alone. There is no hidden state, so the oracle
knows nothing that a model couldn't learn. Here w are the shares below, h_T is the last item, and a is the age (0 for
the last item):

    p(i | h) = w_follow  follow(i | h_T)                            what comes after the last item
             + w_taste   Σ_a  decay^a taste(i | h_{T-a}) / Σ_a decay^a    similar to recent purchases
             + w_explore popularity(i)                              what everybody buys

A user's tastes come from the last few items, and every purchase joins the history, so tastes drift: within a brand to
other categories, and along the ring to other products. After an empty history, p(i | h) = popularity(i).

The same seed gives the same files on every platform. Weights are integers, so their sums are exact, and all randomness
comes from `Generator.random` (PCG64). Floating point is used only for single IEEE operations and running sums, because
the last bit of powers, logarithms and matrix products depends on the library.

    world = generate(num_users=6000, num_items=1200, seed=0)
    world.next_item_probabilities([np.array([3, 14, 15])])  # float64 [1, 1200]
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from simgr_jax.data.dataset import Sequences
from simgr_jax.errors import UserError
from simgr_jax.workdir.atomic_write import atomic_path

SEQUENCES_FILE = "user_sequence.txt"
TEXTS_FILE = "item_plain_text.txt"
ARGUMENTS_FILE = "synthetic.json"

FOLLOW_SHARE = 0.45
TASTE_SHARE = 0.45
EXPLORE_SHARE = 0.10
TASTE_DECAY = 0.8  # an item in the history loses weight by this factor for each item bought since

# A user has at least 5 items, as in 5-core datasets, and at most 24. Each length is 0.84 times as likely as the one
# before it, which gives a mean of 9.6.
MIN_LENGTH, MAX_LENGTH, LENGTH_DECAY = 5, 24, 0.84

# The weight of the item of popularity rank r is POPULARITY_SCALE // (r + POPULARITY_SHIFT).
POPULARITY_SCALE, POPULARITY_SHIFT = 1_000_000, 60

# category: (words for its texts, products in the order people buy them, materials)
_CATEGORIES = {
    "kitchen": (
        "cooking cookware",
        "skillet, spatula, saucepan, colander, mixing bowl, whisk, cutting board, chef knife",
        "copper, cast-iron, silicone, enamel",
    ),
    "coffee": (
        "tea barista",
        "grinder, espresso maker, milk frother, travel mug, teapot, infuser, kettle, saucer",
        "porcelain, stainless, glass, ceramic",
    ),
    "dining": (
        "tableware table",
        "dinner plate, soup bowl, cutlery set, tumbler, carafe, napkin, tablecloth, candle holder",
        "linen, stoneware, crystal, pewter",
    ),
    "bedroom": (
        "bedding sleep",
        "duvet, pillowcase, blanket, mattress topper, bedside lamp, alarm clock, curtain, rug",
        "cotton, wool, bamboo, velvet",
    ),
    "office": (
        "desktop stationery",
        "writing desk, chair, monitor stand, desk pad, notebook, fountain pen, printer, ink cartridge",
        "oak, walnut, leather, aluminium",
    ),
    "electronics": (
        "computer audio",
        "laptop sleeve, keyboard, mouse, webcam, microphone, headphones, charging cable, power bank",
        "nylon, graphite, magnesium, rubber",
    ),
    "photography": (
        "photo studio",
        "camera, lens, tripod, camera bag, memory card, flash, light stand, picture frame",
        "carbon, canvas, titanium, polymer",
    ),
    "hiking": (
        "outdoor camping",
        "backpack, water bottle, tent, sleeping bag, headlamp, trekking poles, socks, rain jacket",
        "ripstop, merino, fleece, kevlar",
    ),
    "fitness": (
        "gym workout",
        "yoga mat, foam roller, resistance band, dumbbell, kettlebell, jump rope, towel, shaker bottle",
        "cork, neoprene, steel, latex",
    ),
    "bathroom": (
        "body care",
        "shower gel, lotion, shampoo, conditioner, hair brush, hand soap, toothbrush, face cream",
        "lavender, eucalyptus, charcoal, almond",
    ),
    "garden": (
        "plants backyard",
        "seed tray, potting soil, watering can, hose, pruning shears, planter, trellis, bird feeder",
        "terracotta, cedar, galvanized, wicker",
    ),
    "pets": (
        "dogs cats",
        "dog bed, leash, food bowl, chew toy, cat tree, scratching post, litter box, pet carrier",
        "hemp, sisal, plush, rattan",
    ),
}

# brand: its lines. Brands 2c .. 2c + 5 serve category c, so neighboring categories share brands.
_BRANDS = {
    "Halden": "Aurora, Fjord, Tundra",
    "Mirelle": "Rosette, Satine, Violette",
    "Okami": "Sakura, Kumo, Hinode",
    "Brightwater": "Harbor, Lagoon, Tidal",
    "Castellan": "Bastion, Rampart, Keep",
    "Dovetail": "Joiner, Mortise, Bevel",
    "Everlund": "Birch, Lynx, Sauna",
    "Fennimore": "Manor, Parlour, Gazette",
    "Granville": "Boulevard, Metro, Plaza",
    "Hexagon": "Vertex, Lattice, Prism",
    "Ironbark": "Outback, Billabong, Mallee",
    "Juniper": "Thicket, Bramble, Hollow",
    "Kestrel": "Falcon, Talon, Updraft",
    "Lumina": "Halo, Photon, Beacon",
    "Montclair": "Alpine, Chalet, Summit",
    "Northgate": "Polar, Compass, Sextant",
    "Orchard": "Pippin, Quince, Cider",
    "Pinnacle": "Apex, Zenith, Crest",
    "Quillon": "Sabre, Lancer, Heraldic",
    "Redfern": "Ember, Cinder, Flare",
    "Solstice": "Equinox, Meridian, Eclipse",
    "Thornbury": "Heath, Moorland, Barrow",
    "Umbra": "Twilight, Dusk, Nocturne",
    "Vantage": "Vista, Panorama, Horizon",
}
_BRANDS_PER_CATEGORY = 6

_ADJECTIVE_LIST = (
    "classic, compact, deluxe, durable, elegant, essential, everyday, handmade, lightweight, "
    "modern, practical, premium, slim, sturdy, vintage, versatile"
)

_CATEGORY_NAMES = list(_CATEGORIES)
_PRODUCTS = [product for _, products, _ in _CATEGORIES.values() for product in products.split(", ")]
_MATERIALS = [material for _, _, materials in _CATEGORIES.values() for material in materials.split(", ")]
_ADJECTIVES = _ADJECTIVE_LIST.split(", ")
_BRAND_NAMES = list(_BRANDS)
_LINES = [line for lines in _BRANDS.values() for line in lines.split(", ")]
_PRODUCTS_PER_CATEGORY = len(_PRODUCTS) // len(_CATEGORIES)
_MATERIALS_PER_CATEGORY = len(_MATERIALS) // len(_CATEGORIES)
_LINES_PER_BRAND = len(_LINES) // len(_BRANDS)

MAX_ITEMS = len(_PRODUCTS) * _BRANDS_PER_CATEGORY * _LINES_PER_BRAND * _MATERIALS_PER_CATEGORY


@dataclasses.dataclass(frozen=True, eq=False)
class Catalog:
    """The items' attributes, each an int64 [N]. No two items share product, line and material.

    Attributes:
      category, product, brand, line, material, adjective: indices into the lists of words above.
      popularity: the weights of popularity(i), positive integers.
    """

    category: np.ndarray
    product: np.ndarray
    brand: np.ndarray
    line: np.ndarray
    material: np.ndarray
    adjective: np.ndarray
    popularity: np.ndarray

    def __len__(self) -> int:
        return len(self.popularity)

    @property
    def item_ids(self) -> list[str]:
        return [f"P{index:05d}" for index in range(len(self))]

    @property
    def texts(self) -> list[str]:
        """[N], e.g. "Everlund Birch compact wool blanket; bedroom bedding sleep"."""
        return [
            f"{_BRAND_NAMES[self.brand[i]]} {_LINES[self.line[i]]} {_ADJECTIVES[self.adjective[i]]} "
            f"{_MATERIALS[self.material[i]]} {_PRODUCTS[self.product[i]]}; "
            f"{_CATEGORY_NAMES[self.category[i]]} {_CATEGORIES[_CATEGORY_NAMES[self.category[i]]][0]}"
            for i in range(len(self))
        ]


@dataclasses.dataclass(frozen=True, eq=False)
class WeightTable:
    """Distributions over the items, one row of integer weights each.

    Attributes:
      weights: int64 [S, N], not negative; each row's sum is positive.
    """

    weights: np.ndarray

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """float64 [S, N], rows sum to 1."""
        return self.weights / self._totals[:, None]

    @functools.cached_property
    def _totals(self) -> np.ndarray:
        """int64 [S]."""
        return self.weights.sum(axis=1)

    @functools.cached_property
    def _cumulative(self) -> np.ndarray:
        """int64 [S N]: one running sum over all rows, so that one binary search draws from any row."""
        return np.cumsum(self.weights)

    def draw(self, rows: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Draws an item, int64 [C], from each of `rows` (int [C]) by inverting `uniform` (float64 [C] in [0, 1))."""
        num_items = self.weights.shape[1]
        totals = self._totals[rows]
        starts = self._cumulative[(rows + 1) * num_items - 1] - totals
        points = starts + np.floor(uniform * totals).astype(np.int64)
        return np.searchsorted(self._cumulative, points, side="right") - rows * num_items


@dataclasses.dataclass(frozen=True, eq=False)
class NextItemLaw:
    """The mixture in the module's docstring.

    Attributes:
      popularity: a single row, popularity(i).
      follow: row j is follow(· | j).
      taste: row j is taste(· | j).
    """

    popularity: WeightTable
    follow: WeightTable
    taste: WeightTable

    def probabilities(self, histories: Sequences) -> np.ndarray:
        """The exact p(i | history), float64 [C, N], of C histories, which may be empty."""
        lengths = histories.lengths
        owners = np.repeat(np.arange(len(lengths)), lengths)
        ages = histories.offsets[1:][owners] - 1 - np.arange(len(owners))
        memory = np.zeros((len(lengths), self.popularity.weights.shape[1]))
        np.add.at(memory, (owners, histories.values), TASTE_DECAY**ages)

        known = lengths > 0
        memory = memory[known] / memory[known].sum(axis=1, keepdims=True)
        last_items = histories.values[histories.offsets[1:][known] - 1]
        probabilities = np.tile(self.popularity.probabilities, (len(lengths), 1))
        probabilities[known] = (
            FOLLOW_SHARE * self.follow.probabilities[last_items]
            + TASTE_SHARE * (memory @ self.taste.probabilities)
            + EXPLORE_SHARE * self.popularity.probabilities
        )
        return probabilities

    def draw(self, rng: np.random.Generator, histories: np.ndarray) -> np.ndarray:
        """Draws a part of the mixture, then a next item, int64 [C], for each row of `histories` (int [C, T])."""
        count, length = histories.shape
        part, age, item = rng.random((3, count))
        explored = self.popularity.draw(np.zeros(count, np.int64), item)
        if length == 0:
            return explored
        cumulative = _geometric_cumulative(TASTE_DECAY, length)
        ages = np.searchsorted(cumulative, age * cumulative[-1], side="right")
        followed = self.follow.draw(histories[:, -1], item)
        liked = self.taste.draw(histories[np.arange(count), length - 1 - ages], item)
        return np.where(part < FOLLOW_SHARE, followed, np.where(part < FOLLOW_SHARE + TASTE_SHARE, liked, explored))


@dataclasses.dataclass(frozen=True, eq=False)
class SyntheticWorld:
    """The shop, the law that its users follow, and their purchases.

    Attributes:
      catalog: N items, in the order of `item_plain_text.txt`.
      law: the distribution of the next item.
      sequences: the items of U users, oldest first, in the order of `user_sequence.txt`.
    """

    catalog: Catalog
    law: NextItemLaw
    sequences: Sequences

    @property
    def user_ids(self) -> list[str]:
        return [f"U{index:06d}" for index in range(len(self.sequences))]

    def next_item_probabilities(self, histories: Sequences | Iterable[np.ndarray]) -> np.ndarray:
        """The exact p(i | history), float64 [C, N], of C histories (item indices, oldest first, possibly empty)."""
        return self.law.probabilities(
            histories if isinstance(histories, Sequences) else Sequences.from_lists(histories)
        )


def generate(num_users: int, num_items: int, seed: int) -> SyntheticWorld:
    """Generates the world of `seed`. It holds two int64 [N, N] tables.

    Raises:
      UserError: `num_users` is below 1, `num_items` is outside 2 .. MAX_ITEMS (6,912: every product in every brand,
        line and material), or `seed` is negative.
    """
    if num_users < 1:
        raise UserError(f"config.data.synthetic.num_users: {num_users} is too few; give 1 or more")
    if not 2 <= num_items <= MAX_ITEMS:
        raise UserError(
            f"config.data.synthetic.num_items: {num_items} is not in 2 .. {MAX_ITEMS}; give a number in that range"
        )
    if seed < 0:
        raise UserError(f"config.data.synthetic.seed: {seed} is negative; give 0 or more")
    rng = np.random.Generator(np.random.PCG64(seed))
    catalog = _draw_catalog(rng, num_items)
    law = NextItemLaw(WeightTable(catalog.popularity[None, :]), _follow_table(rng, catalog), _taste_table(catalog))
    return SyntheticWorld(catalog, law, _draw_sequences(rng, law, num_users))


def _draw_sequences(rng: np.random.Generator, law: NextItemLaw, num_users: int) -> Sequences:
    """Lengths don't depend on the items, so a history's length says nothing about the next item."""
    cumulative = _geometric_cumulative(LENGTH_DECAY, MAX_LENGTH - MIN_LENGTH + 1)
    lengths = MIN_LENGTH + np.searchsorted(cumulative, rng.random(num_users) * cumulative[-1], side="right")
    items = np.zeros((num_users, lengths.max()), np.int64)
    for position in range(items.shape[1]):
        users = np.flatnonzero(lengths > position)
        items[users, position] = law.draw(rng, items[users, :position])
    written = np.arange(items.shape[1]) < lengths[:, None]
    return Sequences.from_lengths(items[written], lengths)


def _draw_catalog(rng: np.random.Generator, num_items: int) -> Catalog:
    combinations = _shuffled(rng, MAX_ITEMS)[:num_items]
    product, brand_of_category, line_of_brand, material_of_category = np.unravel_index(
        combinations, (len(_PRODUCTS), _BRANDS_PER_CATEGORY, _LINES_PER_BRAND, _MATERIALS_PER_CATEGORY)
    )
    category = product // _PRODUCTS_PER_CATEGORY
    brand = (2 * category + brand_of_category) % len(_BRANDS)
    return Catalog(
        category=category,
        product=product,
        brand=brand,
        line=brand * _LINES_PER_BRAND + line_of_brand,
        material=category * _MATERIALS_PER_CATEGORY + material_of_category,
        adjective=np.floor(rng.random(num_items) * len(_ADJECTIVES)).astype(np.int64),
        popularity=POPULARITY_SCALE // (_shuffled(rng, num_items) + POPULARITY_SHIFT),
    )


def _follow_table(rng: np.random.Generator, catalog: Catalog) -> WeightTable:
    """Favors the next three products of the ring, more so in the same line or brand, and two companions per item.

    Titles reveal the products that follow, but not the companions: these are drawn once among plausible items, and can
    only be learned from interactions.
    """
    steps = (catalog.product[None, :] - catalog.product[:, None]) % len(_PRODUCTS)
    succession = np.array([0, 120, 50, 20] + [0] * (len(_PRODUCTS) - 4), dtype=np.int64)[steps]
    weights = (1 + succession) * _loyalty(catalog, brand=6, line=30) * catalog.popularity
    np.fill_diagonal(weights, 0)

    plausible = WeightTable(weights)
    items = np.arange(len(catalog))
    boosted = weights.copy()
    for _ in range(2):
        companions = plausible.draw(items, rng.random(len(catalog)))
        boosted[items, companions] = weights[items, companions] + weights.sum(axis=1) // 10
    return WeightTable(boosted)


def _taste_table(catalog: Catalog) -> WeightTable:
    """Favors items of the same category, brand and, most of all, line, whatever the product."""
    same_category = catalog.category[:, None] == catalog.category
    weights = (1 + 5 * same_category) * _loyalty(catalog, brand=10, line=120) * catalog.popularity
    np.fill_diagonal(weights, 0)
    return WeightTable(weights)


def _loyalty(catalog: Catalog, brand: int, line: int) -> np.ndarray:
    """int64 [N, N]: `line` for two items of the same line, `brand` for others of the same brand, else 1."""
    same_brand = catalog.brand[:, None] == catalog.brand
    same_line = catalog.line[:, None] == catalog.line
    return np.where(same_line, line, np.where(same_brand, brand, 1))


def _shuffled(rng: np.random.Generator, count: int) -> np.ndarray:
    """0 .. count - 1 in random order. Sorts random numbers, as NumPy may change how `Generator.permutation` works."""
    return np.argsort(rng.random(count), kind="stable")


def _geometric_cumulative(decay: float, count: int) -> np.ndarray:
    """float64 [count]: the running sum of 1, decay, decay², ..., computed by repeated multiplication."""
    return np.cumsum(np.cumprod(np.concatenate([[1.0], np.full(count - 1, decay)])))


def ensure(path: Path, num_users: int = 6000, num_items: int = 1200, seed: int = 0) -> None:
    """Writes `generate(...)` and its arguments into the folder `path` as P5 files, unless they are there already.

    Adds files that a killed run did not write. Never overwrites anything.

    Raises:
      UserError: an argument is out of range (see `generate`); `path` holds data of other arguments, of another version
        of this module or of another source; or `path` can't be written.
    """
    path = Path(path)
    arguments = {"num_users": num_users, "num_items": num_items, "seed": seed}
    found = _read_arguments(path / ARGUMENTS_FILE) or arguments
    if found != arguments:
        raise UserError(
            f"{path / ARGUMENTS_FILE}: the data there was made with {_spell(found)}, not {_spell(arguments)}; "
            "choose another folder, or remove this one"
        )
    files = _render(generate(**arguments))
    missing = [name for name, content in files.items() if not _is_written(path / name, content)]
    for name in missing:
        with atomic_path(path / name) as temporary:
            temporary.write_bytes(files[name])
    if not (path / ARGUMENTS_FILE).exists():
        with atomic_path(path / ARGUMENTS_FILE) as temporary:
            temporary.write_text(json.dumps(arguments) + "\n", encoding="utf-8")


def oracle(path: Path) -> SyntheticWorld:
    """Generates again the world whose files `ensure` wrote into `path`. Its indices follow the files' order.

    Raises:
      UserError: `path` has no such files, or they differ from what this version of the module makes.
    """
    path = Path(path)
    arguments = _read_arguments(path / ARGUMENTS_FILE)
    if arguments is None:
        raise UserError(f"{path / ARGUMENTS_FILE}: no such file; give a folder of synthetic data")
    world = generate(**arguments)
    for name, content in _render(world).items():
        if not _is_written(path / name, content):
            raise UserError(f"{path / name}: no such file; remove the folder, and it will be made again")
    return world


def _render(world: SyntheticWorld) -> dict[str, bytes]:
    """The contents of the two files, by name."""
    item_ids = world.catalog.item_ids
    texts = "".join(f"{item} {text}\n" for item, text in zip(item_ids, world.catalog.texts, strict=True))
    sequences = "".join(
        f"{user} {' '.join(item_ids[i] for i in items)}\n"
        for user, items in zip(world.user_ids, world.sequences, strict=True)
    )
    return {TEXTS_FILE: texts.encode(), SEQUENCES_FILE: sequences.encode()}


def _read(file: Path) -> bytes | None:
    """The file's contents, or None if it doesn't exist."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror}); choose another folder") from error


def _is_written(file: Path, content: bytes) -> bool:
    """Whether `file` exists. Raises a UserError if it holds something other than `content`."""
    found = _read(file)
    if found is not None and found != content:
        raise UserError(
            f"{file}: not what this version makes from the arguments in {ARGUMENTS_FILE}; "
            "choose another folder, or remove this one if you can make its data again"
        )
    return found is not None


def _read_arguments(file: Path) -> dict[str, int] | None:
    content = _read(file)
    if content is None:
        return None
    try:
        arguments = json.loads(content)
    except ValueError:
        arguments = None
    expected = {"num_users", "num_items", "seed"}
    if not isinstance(arguments, dict) or set(arguments) != expected or {type(v) for v in arguments.values()} != {int}:
        raise UserError(
            f"{file}: not a JSON object of the integers {', '.join(sorted(expected))}; remove the folder, "
            "and it will be made again"
        )
    return arguments


def _spell(arguments: dict[str, int]) -> str:
    return ", ".join(f"{key}={value}" for key, value in arguments.items())
