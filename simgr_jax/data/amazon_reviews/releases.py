"""The categories, file names, URLs and field names of the three releases of Amazon Reviews.

2014  J. McAuley et al., "Image-based recommendations on styles and substitutes", SIGIR 2015.
2018  J. Ni et al., "Justifying recommendations using distantly-labeled reviews and fine-grained aspects", EMNLP 2019.
2023  Y. Hou et al., "Bridging language and items for retrieval and recommendation", arXiv 2403.03952.
"""

from __future__ import annotations

import dataclasses

HOST = "https://mcauleylab.ucsd.edu/public_datasets/data"
FIVE_CORE = "_5"  # suffix of a reviews file that holds only users and items with 5 reviews or more


@dataclasses.dataclass(frozen=True)
class Release:
    """One release. In paths, `{category}` stands for the category, including `_5` if it has that.

    Attributes:
      reviews, five_core, items: paths of the gzip files below `HOST`; `five_core` is None if none is published.
      user, item, timestamp, rating: the field names of a review.
      ticks: timestamp units per second.
      items_are_python: each line of the item metadata is a Python dict, not JSON.
      categories: as in the file names.
    """

    reviews: str
    five_core: str | None
    items: str
    user: str
    item: str
    timestamp: str
    rating: str
    ticks: int
    items_are_python: bool
    categories: tuple[str, ...]


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


RELEASES = {
    "2014": Release(
        reviews="amazon/categoryFiles/reviews_{category}.json.gz",
        five_core="amazon/categoryFiles/reviews_{category}.json.gz",
        items="amazon/categoryFiles/meta_{category}.json.gz",
        user="reviewerID",
        item="asin",
        timestamp="unixReviewTime",
        rating="overall",
        ticks=1,
        items_are_python=True,
        categories=_names(
            """Amazon_Instant_Video Apps_for_Android Automotive Baby Beauty Books CDs_and_Vinyl
            Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics Grocery_and_Gourmet_Food
            Health_and_Personal_Care Home_and_Kitchen Kindle_Store Movies_and_TV Musical_Instruments Office_Products
            Patio_Lawn_and_Garden Pet_Supplies Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games
            Video_Games"""
        ),
    ),
    "2018": Release(
        reviews="amazon_v2/categoryFiles/{category}.json.gz",
        five_core="amazon_v2/categoryFilesSmall/{category}.json.gz",
        items="amazon_v2/metaFiles2/meta_{category}.json.gz",
        user="reviewerID",
        item="asin",
        timestamp="unixReviewTime",
        rating="overall",
        ticks=1,
        items_are_python=False,
        categories=_names(
            """AMAZON_FASHION All_Beauty Appliances Arts_Crafts_and_Sewing Automotive Books CDs_and_Vinyl
            Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics Gift_Cards
            Grocery_and_Gourmet_Food Home_and_Kitchen Industrial_and_Scientific Kindle_Store Luxury_Beauty
            Magazine_Subscriptions Movies_and_TV Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies
            Prime_Pantry Software Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Video_Games"""
        ),
    ),
    "2023": Release(
        reviews="amazon_2023/raw/review_categories/{category}.jsonl.gz",
        five_core=None,
        items="amazon_2023/raw/meta_categories/meta_{category}.jsonl.gz",
        user="user_id",
        item="parent_asin",
        timestamp="timestamp",
        rating="rating",
        ticks=1000,
        items_are_python=False,
        categories=_names(
            """All_Beauty Amazon_Fashion Appliances Arts_Crafts_and_Sewing Automotive Baby_Products
            Beauty_and_Personal_Care Books CDs_and_Vinyl Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry
            Digital_Music Electronics Gift_Cards Grocery_and_Gourmet_Food Handmade_Products Health_and_Household
            Health_and_Personal_Care Home_and_Kitchen Industrial_and_Scientific Kindle_Store Magazine_Subscriptions
            Movies_and_TV Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies Software
            Sports_and_Outdoors Subscription_Boxes Tools_and_Home_Improvement Toys_and_Games Unknown
            Video_Games"""
        ),
    ),
}
