"""Amazon's product files: title, brand, categories, description and features, of every release."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from .lines import flat_text, json_objects

logger = logging.getLogger(__name__)

# Our name of a text -> what the releases call it; the first that is there and not empty counts.
FIELDS = {
    "title": ("title",),
    "brand": ("brand", "store"),
    "categories": ("categories", "category"),
    "description": ("description",),
    "features": ("features", "feature"),
}


def product_texts(path: Path, key: str, products: Sequence[str]) -> tuple[dict[str, str], ...]:
    """The texts of every product by our names, empty ones left out.

    path: JSON lines or, as in 2014, Python literals; key: the field that names a product. Lists, of
    any depth, become one text. Of several lines of a product the last that has the text counts.
    Raises ValueError naming the file and the line that cannot be read or names no product, and when
    the file is about none of the products.
    """
    found: dict[str, dict[str, str]] = {product: {} for product in products}
    told = set()
    for number, row in json_objects(path, literals=True):
        if key not in row:
            raise ValueError(
                f"{path}, line {number}: expected a product with {key}, got "
                f"{', '.join(map(str, list(row)[:4])) or 'nothing'}; is it a file of another "
                "release?"
            )
        product = row[key]
        if not isinstance(product, str) or not product:
            raise ValueError(
                f"{path}, line {number}: {key} must be a text that is not empty, got {product!r}; "
                "fetch the file again"
            )
        if product in found:
            told.add(product)
            for name, theirs in FIELDS.items():
                text = next(filter(None, (flat_text(row.get(field)) for field in theirs)), "")
                if text:
                    found[product][name] = text
    if not told:
        raise ValueError(
            f"{path} has none of the {len(found):,} products, such as {next(iter(found))!r}; name "
            "the meta_* file of the same category"
        )
    logger.info("%s: texts of %s of %s products", path.name, f"{len(told):,}", f"{len(found):,}")
    return tuple(found.values())
