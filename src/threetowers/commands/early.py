"""What can be refused before torch is imported, which takes seconds on a busy machine."""

import os

from threetowers.config import RunConfig, check, data_of
from threetowers.data.source import SPLIT_COLUMN, ColumnNames
from threetowers.objective.pairs import objective


def check_run(config: RunConfig, *, compared: bool = False) -> None:
    """Raises UsageError for settings that no run can have, and what `check_data` raises for the run's data.

    compared: the settings are those that several methods share, each of which has its own objective. Processes that
    train together are not checked here, since `train` lets only one of them report an error.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    check(config)
    if not compared:
        objective(config)
    if (data := data_of(config)) != "shapes":
        inputs = config.inputs
        check_data(data, inputs.image_column, inputs.caption_columns, inputs.split_column)


def check_data(
    path: str,
    image_column: str | None,
    caption_columns: tuple[str, ...],
    split_column: str | None = SPLIT_COLUMN,
) -> None:
    """Raises DataError where nothing is at the path, and UsageError for columns that a table does not have.

    Of a table some rows are read, of other data nothing.
    """
    from threetowers.data.open import check_columns  # not at the top: --help needs no formats

    check_columns(path, ColumnNames(image_column, caption_columns, split_column))
