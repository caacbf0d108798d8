"""What an avatar may look like: fields, the values of each, what DiceBear draws for a value, and how captions say it.

Only variants whose value can be told apart are listed; a beard, faint in this style, is never drawn. Under some hats
short hair does not show, so that its colour is known by the label alone.

It does not know how pictures are drawn, nor which cells are held out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .emoji_captions import BACKGROUNDS, article_of

STYLE = "pixel-art"  # of the package dicebear-styles, CC0 1.0
LANGUAGES = ("en", "ru")
NONE = "none"  # the value of a field for what is not there; it is not spoken of


@dataclass(frozen=True)
class Value:
    """A value: its English and Russian words (the latter after "с", with), its chance, and DiceBear's options.

    options: option -> what is drawn from, evenly.
    """

    en: str
    ru: str
    weight: int = 1
    options: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)


def _numbered(stem: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{stem}{number:02}" for number in numbers)


def _hat(en: str, ru: str, colour: str) -> Value:
    return Value(en, ru, 1, {"hatProbability": (100,), "hatColor": (colour,)})


def _glasses(en: str, ru: str, *variants: str) -> Value:
    return Value(en, ru, 1, {"glassesProbability": (100,), "glassesVariant": variants})


FIELDS: dict[str, dict[str, Value]] = {
    "hair": {
        "long": Value("long", "длинными", 1, {"hairVariant": _numbered("long", 1, 2, 3, 4, 7, 9, 12, 13, 20, 21)}),
        "short": Value("short", "короткими", 1, {"hairVariant": _numbered("short", 1, 2, 3, 4, 14, 15, 17)}),
    },
    "hair_colour": {
        "black": Value("black", "чёрными", 1, {"hairColor": ("#28150a",)}),
        "brown": Value("brown", "каштановыми", 1, {"hairColor": ("#603a14", "#603015")}),
        "blond": Value("blond", "светлыми", 1, {"hairColor": ("#cab188",)}),
        "red": Value("red", "красными", 1, {"hairColor": ("#bd1700",)}),
        "blue": Value("blue", "голубыми", 1, {"hairColor": ("#009bbd",)}),
        "green": Value("green", "зелёными", 1, {"hairColor": ("#91cb15",)}),
    },
    "skin": {
        "light": Value("light", "светлой", 1, {"skinColor": ("#ffdbac", "#f5cfa0")}),
        "medium": Value("medium", "смуглой", 1, {"skinColor": ("#e0b687", "#cb9e6e")}),
        "dark": Value("dark", "тёмной", 1, {"skinColor": ("#a26d3d", "#8d5524")}),
    },
    "glasses": {
        NONE: Value("", "", 2, {"glassesProbability": (0,)}),
        "dark": _glasses("dark glasses", "тёмными очками", *_numbered("dark", 2, 3, 5, 6, 7)),
        "light": _glasses("clear glasses", "прозрачными очками", *_numbered("light", 1, 2, 5, 6, 7)),
    },
    "hat": {
        NONE: Value("", "", 4, {"hatProbability": (0,)}),
        "blue": _hat("a blue hat", "синей шапкой", "#2663a3"),
        "green": _hat("a green hat", "зелёной шапкой", "#3d8a6b"),
        "pink": _hat("a pink hat", "розовой шапкой", "#cc6192"),
        "red": _hat("a red hat", "красной шапкой", "#a62116"),
    },
    "mouth": {
        "happy": Value("a smile", "улыбкой", 1, {"mouthVariant": _numbered("happy", 6, 7, 8, 9, 12)}),
        "sad": Value("a sad mouth", "грустным ртом", 1, {"mouthVariant": _numbered("sad", 1, 2, 3, 8, 9)}),
    },
    "clothes": {
        "blue": Value("blue", "синей", 1, {"clothingColor": ("#428bca", "#03396c")}),
        "green": Value("green", "зелёной", 1, {"clothingColor": ("#44c585", "#00b159")}),
        "red": Value("red", "красной", 1, {"clothingColor": ("#d11141", "#ae0001")}),
        "yellow": Value("yellow", "жёлтой", 1, {"clothingColor": ("#ffd969", "#ffc425")}),
    },
    "background": {
        colour: Value(f"{article_of(colour)} {colour}", BACKGROUNDS[colour][1])
        for colour in ("white", "grey", "cyan", "pink")
    },
}
# Drawn, and not spoken of.
UNNAMED: dict[str, tuple[str | int, ...]] = {
    "eyesVariant": _numbered("variant", *range(1, 13)),
    "eyesColor": ("#76778b", "#647b90", "#588387", "#876658"),
    "glassesVariant": ("light01",),
    "glassesColor": ("#4b4b4b", "#191919", "#43677d", "#a04b5d"),
    "hatVariant": _numbered("variant", 1, 2, 3, 4, 5, 6, 8, 9, 10),
    "hatColor": ("#2663a3",),
    "clothesVariant": _numbered("variant", 1, 3, 4, 8, 11, 12, 14, 17, 23),
    "mouthColor": ("#e35d6a", "#de0f0d"),
    "beardProbability": (0,),
    "accessoriesProbability": (0,),
}


def caption(attributes: Mapping[str, str], language: str) -> str:
    """The caption of {field: value}. Raises ValueError for other fields or values, or a language outside LANGUAGES."""
    wrong = {name: value for name, value in attributes.items() if value not in FIELDS.get(name, {})}
    if language not in LANGUAGES or wrong or attributes.keys() != FIELDS.keys():
        raise ValueError(
            f"a caption needs the fields {', '.join(FIELDS)} in one of {LANGUAGES}; got {wrong}, {language!r}"
        )
    said = {name: getattr(FIELDS[name][value], language) for name, value in attributes.items()}
    worn = [said[name] for name in ("glasses", "hat", "mouth") if said[name]]
    if language == "ru":
        parts = [f"{said['hair']} {said['hair_colour']} волосами", f"{said['skin']} кожей", *worn]
        return f"пиксельный портрет с {', '.join(parts)} и {said['clothes']} одеждой на {said['background']} фоне"
    parts = [f"{said['hair']} {said['hair_colour']} hair", f"{said['skin']} skin", *worn]
    return f"a pixel portrait with {', '.join(parts)} and {said['clothes']} clothes on {said['background']} background"
