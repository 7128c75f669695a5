"""The two usual ways to judge lists: with the items of a user's history left in, or taken out."""

from __future__ import annotations

# The prefixes of metrics' names. Papers on semantic IDs leave history items in; RecTools and others take them out.
LEFT_IN, FILTERED = "", "filtered/"
PROTOCOLS = (LEFT_IN, FILTERED)
