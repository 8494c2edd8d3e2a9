"""Corpus `hf:NAME[:CONFIG][:SPLIT][:FIELD]`: a data set from the Hugging Face hub, one document a row.

Choose data sets whose rows are documents. Where a row is a line (wikitext), neighbouring lines fall on both sides of
the split and held-out figures come out too good.
"""

from __future__ import annotations

from importlib.util import find_spec

from archbench.data.document import Document
from archbench.errors import DataError, MissingExtra

FORM = "NAME[:CONFIG][:SPLIT][:FIELD]"


def read(argument: str) -> list[Document]:
    """The rows' texts. CONFIG defaults to the data set's own, SPLIT to train, FIELD to text; a part may be left empty.

    Raises MissingExtra without the package `datasets`, DataError when the hub or the data set cannot be had.
    """
    where = f"hf:{argument}"
    parts = argument.split(":")
    if len(parts) > 4 or not parts[0]:
        raise DataError(f"{where}: {len(parts)} parts; expected hf:{FORM}")
    if find_spec("datasets") is None:
        raise MissingExtra(f"{where}: the hub needs the package datasets: pip install 'archbench[hub]'")
    import datasets

    name, config, split, field = (*parts, "", "", "", "")[:4]
    split, field = split or "train", field or "text"
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:  # offline and unknown names are OSErrors there, a wrong config ValueError
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{where}: cannot be loaded ({type(error).__name__}: {reason}); "
            "check the name and the network, or use dir:, jsonl: or parquet: with a local copy"
        ) from error
    if field not in rows.column_names:
        raise DataError(f"{where}: no field '{field}'; this data set has: {', '.join(rows.column_names)}")
    documents = []
    for row, text in enumerate(rows[field]):
        if not isinstance(text, str):
            raise DataError(f"{where}: row {row}: '{field}' holds {type(text).__name__}; name a field of strings")
        documents.append(Document(f"{split}:{row}", text.encode()))
    return documents
