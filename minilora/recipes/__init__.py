"""Ready configurations, a TOML file each: for a size of card, or for a set-up that somebody has published.

A recipe is the beginning of a configuration: `minilora train --recipe 24gb my.toml --data.train chats.jsonl` lays the
file and the command line over it. Its first comment line says what it is.
"""

from pathlib import Path

from minilora.errors import UsageError

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """All there are."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def recipe_file(name: str) -> Path:
    """The TOML file of a recipe. Raises UsageError, which names all, if there is none of the name."""
    if name not in recipe_names():
        raise UsageError(f"there is no recipe {name!r}; there are {', '.join(recipe_names())}")
    return FOLDER / f"{name}.toml"


def summary(name: str) -> str:
    """What the recipe is, in one line."""
    return recipe_file(name).read_text("utf-8").partition("\n")[0].removeprefix("# ")
