"""Text of strangers (file names, tensor names, messages) on its way to a terminal."""


def printable(text: str) -> str:
    """Escape what a terminal would act on, or could not show: control characters and undecodable bytes."""
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)
