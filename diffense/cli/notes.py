"""What several commands tell on standard error."""

from typing import TYPE_CHECKING, Final

from rich.console import Console

from diffense.text import printable

if TYPE_CHECKING:
    from diffense.images import Images

GROUPS_HELP: Final = (
    "Regular expression: images belong together (frames of a scene) whose names below the folder agree in its first group."
)


def note_skipped(console: Console, images: "Images") -> None:
    """Name the images that could not be read, one a line; no file name gets to command the terminal."""
    for skipped in images.skipped:
        line = f"skipped {printable(skipped.name)}: {printable(skipped.reason)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
