"""Every `kartina ...` that the README, docs/ and the headers of recipes show is one that the command line takes.

None of them runs: their words are parsed, and the recipes and overrides that they name are loaded.
"""

import re
import shlex
from pathlib import Path

import pytest
import typer

from kartina import cli
from kartina.training import run as runs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "training" / "recipes").rglob("*.yaml"))
# For the words that stand for anything.
STAND_INS = {"RECIPE": "shapes/dalle", "OUT/recipe.yaml": "shapes/stable-diffusion", "N": "1"}


def commands_of(page: Path) -> list[str]:
    """Those of its blocks, and those between backticks, which may go over the end of a line."""
    lines = page.read_text(encoding="utf-8").splitlines()
    block = [match[1] for line in lines if (match := re.match(r" {4}(?:\$ )?(kartina .*?)(?: +# .*)?$", line))]
    text = " ".join(line for line in lines if not line.startswith("    "))
    return block + re.findall(r"`(kartina [^`]+)`", text)


def commands_in_header(recipe: Path) -> list[str]:
    """Those of its comments, up to a mark between two phrases or the end of the line."""
    header = "\n".join(line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return re.findall(r"kartina .*?(?=[,:;)] |[,:;)]?$)", header, re.MULTILINE)


def check(words: list[str]) -> None:
    """Raises click's UsageError, or RecipeError, unless the command line takes these words."""
    command = typer.main.get_command(cli.app)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"there is no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    if not words:
        return  # the name alone
    given = command.make_context(command.name, list(words)).params
    if "overrides" in given:
        _, training = runs.load(given["recipe"], given["overrides"] or [])
        assert given["stage"] is None or given["stage"] in training.stages
    for word in words:  # what a training leaves
        if match := re.match(r"runs/([\w-]+/[\w.-]+)/model", word):
            runs.find(match[1])


@pytest.mark.parametrize("source", [*PAGES, *RECIPES], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_command_line_takes_every_command_that_is_shown(source):
    before: list[str] = []
    for line in commands_in_header(source) if source in RECIPES else commands_of(source):
        words = [STAND_INS.get(word, word) for word in shlex.split(re.sub(r"\[(?:[A-Z]|--)[^]]*\]", "", line))[1:]]
        if words[1:2] == ["..."]:
            words = [*before, *words[2:]]
        try:
            check(words)
        except Exception as error:
            pytest.fail(f"{line}: {getattr(error, 'message', error)}")
        before = words if words[:1] == ["train"] else before


def test_commands_are_found_where_they_are_written(tmp_path):
    """Or the test above would hold of nothing."""
    assert "kartina models" in commands_of(ROOT / "README.md")
    assert sum(len(commands_of(page)) for page in PAGES) >= 50
    assert all(commands_in_header(recipe) for recipe in RECIPES)
    (tmp_path / "page.md").write_text(
        "    $ kartina plan a/b  # counts\n\nIt says `kartina\npaint` and `kartina train\na/b`."
    )
    assert commands_of(tmp_path / "page.md") == ["kartina plan a/b", "kartina paint", "kartina train a/b"]
    (tmp_path / "a.yaml").write_text(
        "# command: kartina train a/b, then kartina paint 7 --model c\n# x: kartina models\n"
    )
    assert commands_in_header(tmp_path / "a.yaml") == [
        "kartina train a/b", "kartina paint 7 --model c", "kartina models",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("plan paper/dalle-12b --shard fsdp", "--shard"),
        ("train shapes/dale", "shapes/dalle"),
        ("train shapes/dalle stages.tokenizer.stops=3", "steps"),
        ("paint x --model runs/shapes/dale/model", "shapes/dalle"),
        ("pant", "no command 'pant'"),
    ],
)
def test_a_wrong_command_is_found(line, says):
    with pytest.raises(Exception, match=says):
        check(shlex.split(line))
