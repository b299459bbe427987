"""Embeddings of a source by a frozen tower, stored ahead of training; in one process or in several."""

from threetowers.commands.arguments import EmbedArguments, part_of_work
from threetowers.data.open import open_source
from threetowers.errors import UsageError
from threetowers.run.setup import pick_device
from threetowers.store.embed import write_store
from threetowers.store.read import Views
from threetowers.towers.frozen.load import load_frozen


def embed(arguments: EmbedArguments) -> str:
    """Embeds what the arguments name, or goes on with it; returns a line that says what is there now.

    Raises UsageError for arguments that cannot be meant, and what loading, opening and embedding raise.
    """
    part = part_of_work(arguments.part)
    if arguments.batch_size < 1 or arguments.workers < 0 or arguments.views < 0:
        raise UsageError("embed: --batch-size is at least 1, --workers and --views at least 0")

    device = pick_device(arguments.device)
    views = Views(arguments.views, arguments.crop_scale, arguments.crop_ratio, arguments.flip)
    source = open_source(
        arguments.data, image_column=arguments.image_column, caption_columns=arguments.caption_columns
    )
    tower = load_frozen(arguments.tower, features=arguments.features, precision=arguments.precision)
    store = write_store(
        tower.to(device), source, arguments.out, device, views=views, dtype=arguments.dtype,
        part=part, batch_size=arguments.batch_size, workers=arguments.workers,
    )  # fmt: skip
    if store is None:
        return f"part {arguments.part} is done; the store is made when the other parts are"
    return f"{arguments.out}: {store.summary()}; use it as --embeddings {arguments.out}"
