"""Captions of emoji, in English and Russian, from CLDR labels and tags.

It does not know pictures, styles' licences or which cells are held out.
"""

from collections.abc import Mapping, Sequence

LANGUAGES = ("en", "ru")
# name: (red, green, blue), Russian prepositional ("на ... фоне")
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], str]] = {
    "white": ((255, 255, 255), "белом"),
    "black": ((20, 20, 20), "чёрном"),
    "grey": ((140, 140, 140), "сером"),
    "red": ((205, 45, 45), "красном"),
    "orange": ((245, 145, 40), "оранжевом"),
    "yellow": ((250, 220, 70), "жёлтом"),
    "green": ((60, 155, 75), "зелёном"),
    "cyan": ((95, 205, 220), "голубом"),
    "blue": ((45, 95, 205), "синем"),
    "purple": ((130, 70, 170), "фиолетовом"),
    "pink": ((245, 165, 195), "розовом"),
    "brown": ((125, 80, 50), "коричневом"),
}
_FEATURES = ("skin tone", "hair", "beard", "bald")
TEMPLATES: dict[str, tuple[str, ...]] = {
    "en": ("{label}", "{label}, {style} style emoji", "an emoji of {label} on {colour} background", "{tags}"),
    "ru": ("{label}", "{label}, стиль {style}", "{label} на {colour} фоне", "{tags}"),
}
NAMES_STYLE, NAMES_COLOUR = 1, 2  # the templates of either language that name label and style, label and background
PLAIN = "white"  # the background of a picture whose captions name none


def plain_label(label: str) -> str:
    """`woman astronaut: dark skin tone` -> `a woman astronaut with dark skin`; other labels come back unchanged."""
    head, colon, rest = label.partition(": ")
    features = rest.split(", ")
    if not colon or not all(feature.endswith(_FEATURES) for feature in features):
        return label
    words = head.split()
    many = words[0] in ("people", "men", "women") or "hands" in words or words[-1].endswith("s")
    article = "" if many else article_of(head) + " "
    said = ["no hair" if feature == "bald" else feature.removesuffix(" tone") for feature in features]
    return f"{article}{head} with {' and '.join(said)}"


def article_of(word: str) -> str:
    """`a` or `an`, by the first letter."""
    return "an" if word[:1].lower() in "aeio" else "a"


def captions(labels: Mapping[str, str], tags: Mapping[str, Sequence[str]], style: str, colour: str) -> list[str]:
    """All captions that are true of one emoji on a background; one that is not PLAIN they must name."""
    found = [
        caption(label, tags[language], style, colour, language, template)
        for language, label in labels.items()
        for template in range(len(TEMPLATES[language]))
        if colour == PLAIN or template == NAMES_COLOUR
    ]
    return list(dict.fromkeys(found))  # without tags the label comes twice


def caption(label: str, tags: Sequence[str], style: str, colour: str, language: str, template: int) -> str:
    """One caption. template: an index into TEMPLATES[language]; an emoji without tags gets its label instead.

    Raises ValueError for a language outside LANGUAGES or a colour outside BACKGROUNDS.
    """
    if language not in LANGUAGES or colour not in BACKGROUNDS:
        raise ValueError(
            f"languages are {', '.join(LANGUAGES)}, colours {', '.join(BACKGROUNDS)}; got {language!r}, {colour!r}"
        )
    if language == "en":
        label, ground = plain_label(label), f"{article_of(colour)} {colour}"
    else:
        ground = BACKGROUNDS[colour][1]
    said = ", ".join(tags[:3]) or label
    return TEMPLATES[language][template].format(label=label, style=style, colour=ground, tags=said)
