"""Captions of the shapes grammar in English and Russian: written, parsed back, compared in meaning, minimally spoiled.

"A above B" and "B below A" mean the same; `canonical` keeps the one with "above" or "left of".

It does not know images or splits.
"""

from collections.abc import Iterator

import numpy as np

from .shapes_scenes import COLOURS, RELATIONS, SHAPES, SIZES, Facts

LANGUAGES = ("en", "ru")
WRONG_KINDS = (
    "swap colours",
    "swap shapes",
    "swap sizes",
    "opposite relation",
    "other axis",
    "one colour",
    "one shape",
    "one size",
    "background",
    "drop an object",
)

_NOMINATIVE, _GENITIVE, _INSTRUMENTAL, _PREPOSITIONAL, _NEUTER = range(5)
_HARD = ("ый", "ого", "ым", "ом", "ое")
_VELAR = ("ий", "ого", "им", "ом", "ое")
_STRESSED = ("ой", "ого", "им", "ом", "ое")
_SOFT = ("ий", "его", "им", "ем", "ее")
_SIZES_RU = (("маленьк", _VELAR), ("больш", _STRESSED))
_COLOURS_RU = (
    ("красн", _HARD),
    ("оранжев", _HARD),
    ("жёлт", _HARD),
    ("зелён", _HARD),
    ("син", _SOFT),
    ("фиолетов", _HARD),
    ("бел", _HARD),
    ("чёрн", _HARD),
)
_SHAPES_RU = (
    ("круг", "круга", "кругом"),
    ("квадрат", "квадрата", "квадратом"),
    ("треугольник", "треугольника", "треугольником"),
    ("ромб", "ромба", "ромбом"),
    ("крест", "креста", "крестом"),
    ("кольцо", "кольца", "кольцом"),
)
_RELATIONS_RU = ("над", "под", "слева от", "справа от")
_RING = SHAPES.index("ring")  # the only neuter noun


def caption_en(facts: Facts) -> str:
    """The English caption, e.g. "a small red ring right of a large blue square on an orange background"."""
    things = [f"a {SIZES[size]} {COLOURS[colour]} {SHAPES[shape]}" for size, colour, shape in facts.objects]
    body = things[0] if facts.relation is None else f"{things[0]} {RELATIONS[facts.relation]} {things[1]}"
    ground = COLOURS[facts.background]
    return f"{body} on {'an' if ground[0] in 'aeiou' else 'a'} {ground} background"


def caption_ru(facts: Facts) -> str:
    """The Russian caption: the second object is instrumental after "над", "под" and genitive after "слева от"."""
    body = _thing_ru(facts.objects[0], _NOMINATIVE)
    if facts.relation is not None:
        case = _INSTRUMENTAL if facts.relation < 2 else _GENITIVE
        body += f" {_RELATIONS_RU[facts.relation]} {_thing_ru(facts.objects[1], case)}"
    stem, endings = _COLOURS_RU[facts.background]
    return f"{body} на {stem}{endings[_PREPOSITIONAL]} фоне"


def _thing_ru(thing: tuple[int, int, int], case: int) -> str:
    size, colour, shape = thing
    form = _NEUTER if shape == _RING and case == _NOMINATIVE else case
    adjectives = [stem + endings[form] for stem, endings in (_SIZES_RU[size], _COLOURS_RU[colour])]
    return " ".join([*adjectives, _SHAPES_RU[shape][case]])


def caption(facts: Facts, language: str) -> str:
    """The caption in "en" or "ru"; ValueError for another language."""
    if language not in LANGUAGES:
        raise ValueError(f"shapes captions exist in {LANGUAGES}, got {language!r}: choose one of these")
    return caption_en(facts) if language == "en" else caption_ru(facts)


def _word_table() -> dict[str, tuple[str, int]]:
    table = {}
    for kind, words in (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES), ("relation", RELATIONS)):
        table.update({word.split()[0]: (kind, i) for i, word in enumerate(words)})
    for kind, stems in (("size", _SIZES_RU), ("colour", _COLOURS_RU)):
        table.update({stem + end: (kind, i) for i, (stem, endings) in enumerate(stems) for end in endings})
    table.update({form: ("shape", i) for i, forms in enumerate(_SHAPES_RU) for form in forms})
    table.update({word.split()[0]: ("relation", i) for i, word in enumerate(_RELATIONS_RU)})
    return table


_WORDS = _word_table()


def parse_caption(text: str) -> Facts:
    """The facts of a caption in either language. ValueError for any text that the grammar would not write."""
    found: dict[str, list[int]] = {"size": [], "colour": [], "shape": [], "relation": []}
    for word in text.split():
        if word in _WORDS:
            kind, index = _WORDS[word]
            found[kind].append(index)
    things = tuple(zip(found["size"], found["colour"], found["shape"], strict=False))
    if 1 <= len(things) <= 2 and len(found["colour"]) == len(things) + 1 and len(found["relation"]) == len(things) - 1:
        facts = Facts(found["colour"][-1], things, found["relation"][0] if found["relation"] else None)
        if text in (caption_en(facts), caption_ru(facts)):
            return facts
    raise ValueError(
        f"not a caption of the shapes grammar: expected e.g. {caption_en(Facts(1, ((0, 0, 5), (1, 4, 1)), 3))!r}, "
        f"got {text!r}: write it with caption_en or caption_ru"
    )


def canonical(facts: Facts) -> Facts:
    """The equal-meaning facts whose relation is "above" or "left of"; one-object facts are returned as they are."""
    if facts.relation is None or facts.relation % 2 == 0:
        return facts
    return Facts(facts.background, facts.objects[::-1], facts.relation - 1)


def same_meaning(a: Facts, b: Facts) -> bool:
    """Whether two facts describe the same scenes."""
    return canonical(a) == canonical(b)


def wrong_captions(facts: Facts, rng: np.random.Generator) -> dict[str, Facts]:
    """Minimal false facts by kind (WRONG_KINDS); kinds that do not apply, or would stay true, are left out."""
    return {kind: wrong for kind, wrong in _edits(facts, rng) if not same_meaning(wrong, facts)}


def _edits(facts: Facts, rng: np.random.Generator) -> Iterator[tuple[str, Facts]]:
    ground, things, relation = facts.background, facts.objects, facts.relation
    if relation is not None:
        for kind, field in (("swap colours", 1), ("swap shapes", 2), ("swap sizes", 0)):
            first = _change(things[0], field, things[1][field])
            yield kind, Facts(ground, (first, _change(things[1], field, things[0][field])), relation)
        yield "opposite relation", Facts(ground, things, relation ^ 1)
        yield "other axis", Facts(ground, things, (relation // 2 * 2 + 2 + int(rng.integers(2))) % 4)
    used = {ground, *(thing[1] for thing in things)}
    free = [c for c in range(len(COLOURS)) if c not in used]
    for kind, field in (("one colour", 1), ("one shape", 2), ("one size", 0)):
        slot = int(rng.integers(len(things)))
        old = things[slot][field]
        others = free if field == 1 else [v for v in range(len(SHAPES if field else SIZES)) if v != old]
        new = _change(things[slot], field, int(rng.choice(others)))
        yield kind, Facts(ground, things[:slot] + (new,) + things[slot + 1 :], relation)
    yield "background", Facts(int(rng.choice(free)), things, relation)
    if relation is not None:
        yield "drop an object", Facts(ground, things[:1])


def _change(thing: tuple[int, int, int], field: int, value: int) -> tuple[int, int, int]:
    return tuple(value if i == field else old for i, old in enumerate(thing))  # type: ignore[return-value]
