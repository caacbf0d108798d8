"""Captions of the shapes grammar in English and Russian: written, parsed back, compared in meaning, minimally spoiled.

"A above B" and "B below A" mean the same; `canonical` keeps the one with "above" or "left of".
"A above B and left of C": both relations are of the first object, and nothing is said of B and C; the two clauses may
change places. "three small red circles" are exactly three; "one" means the same as "a".

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
NUMBERS = ("one", "two", "three", "four")

_NOMINATIVE, _GENITIVE, _INSTRUMENTAL, _PREPOSITIONAL, _NEUTER, _GENITIVE_PLURAL = range(6)
_HARD = ("ый", "ого", "ым", "ом", "ое", "ых")
_VELAR = ("ий", "ого", "им", "ом", "ое", "их")
_STRESSED = ("ой", "ого", "им", "ом", "ое", "их")
_SOFT = ("ий", "его", "им", "ем", "ее", "их")
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
_NUMBERS_RU = ("один", "два", "три", "четыре")  # no noun is feminine, so "две" never occurs
_RING = SHAPES.index("ring")  # the only neuter noun


def caption_en(facts: Facts) -> str:
    """The English caption, e.g. "a small red ring right of a large blue square on an orange background"."""
    names = [f"{SIZES[size]} {COLOURS[colour]} {SHAPES[shape]}" for size, colour, shape in facts.objects]
    if facts.counted:
        plural = "" if len(names) == 1 else "es" if names[0].endswith("s") else "s"
        body = f"{NUMBERS[len(names) - 1]} {names[0]}{plural}"
    else:
        clauses = [f" {RELATIONS[r]} a {name}" for r, name in zip(facts.relations, names[1:], strict=True)]
        body = f"a {names[0]}" + " and".join(clauses)
    ground = COLOURS[facts.background]
    return f"{body} on {'an' if ground[0] in 'aeiou' else 'a'} {ground} background"


def caption_ru(facts: Facts) -> str:
    """The Russian caption: a second object is instrumental after "над", "под" and genitive after "слева от".

    After two, three and four the noun is genitive singular and its adjectives genitive plural.
    """
    if facts.counted:
        body = _count_ru(facts.objects[0], len(facts.objects))
    else:
        clauses = [
            f" {_RELATIONS_RU[r]} {_thing_ru(thing, _INSTRUMENTAL if r < 2 else _GENITIVE)}"
            for r, thing in zip(facts.relations, facts.objects[1:], strict=True)
        ]
        body = _thing_ru(facts.objects[0], _NOMINATIVE) + " и".join(clauses)
    stem, endings = _COLOURS_RU[facts.background]
    return f"{body} на {stem}{endings[_PREPOSITIONAL]} фоне"


def _thing_ru(thing: tuple[int, int, int], case: int) -> str:
    form = _NEUTER if thing[2] == _RING and case == _NOMINATIVE else case
    return f"{_adjectives_ru(thing, form)} {_SHAPES_RU[thing[2]][case]}"


def _count_ru(thing: tuple[int, int, int], count: int) -> str:
    if count == 1:
        return f"{'одно' if thing[2] == _RING else 'один'} {_thing_ru(thing, _NOMINATIVE)}"
    noun = _SHAPES_RU[thing[2]][_GENITIVE]
    return f"{_NUMBERS_RU[count - 1]} {_adjectives_ru(thing, _GENITIVE_PLURAL)} {noun}"


def _adjectives_ru(thing: tuple[int, int, int], form: int) -> str:
    return " ".join(stem + endings[form] for stem, endings in (_SIZES_RU[thing[0]], _COLOURS_RU[thing[1]]))


def caption(facts: Facts, language: str) -> str:
    """The caption in "en" or "ru"; ValueError for another language."""
    if language not in LANGUAGES:
        raise ValueError(f"shapes captions exist in {LANGUAGES}, got {language!r}: choose one of these")
    return caption_en(facts) if language == "en" else caption_ru(facts)


def _word_table() -> dict[str, tuple[str, int]]:
    table = {"одно": ("number", 0)}
    for kind, words in (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES), ("relation", RELATIONS)):
        table.update({word.split()[0]: (kind, i) for i, word in enumerate(words)})
    for kind, stems in (("size", _SIZES_RU), ("colour", _COLOURS_RU)):
        table.update({stem + end: (kind, i) for i, (stem, endings) in enumerate(stems) for end in endings})
    table.update({form: ("shape", i) for i, forms in enumerate(_SHAPES_RU) for form in forms})
    table.update({word.split()[0]: ("relation", i) for i, word in enumerate(_RELATIONS_RU)})
    table.update({word: ("number", i) for words in (NUMBERS, _NUMBERS_RU) for i, word in enumerate(words)})
    table.update({word + end: ("shape", i) for i, word in enumerate(SHAPES) for end in ("s", "es")})
    return table


_WORDS = _word_table()


def parse_caption(text: str) -> Facts:
    """The facts of a caption in either language. ValueError for any text that the grammar would not write."""
    found: dict[str, list[int]] = {"size": [], "colour": [], "shape": [], "relation": [], "number": []}
    for word in text.split():
        if word in _WORDS:
            kind, index = _WORDS[word]
            found[kind].append(index)
    things = tuple(zip(found["size"], found["colour"], found["shape"], strict=False))
    relations, numbers = tuple(found["relation"]), found["number"]
    if 1 <= len(things) <= 3 and len(found["colour"]) == len(things) + 1 and len(relations) == len(things) - 1:
        counted = len(numbers) == 1 and len(things) == 1
        facts = Facts(found["colour"][-1], things * (numbers[0] + 1) if counted else things, relations, counted)
        if text in (caption_en(facts), caption_ru(facts)):
            return facts
    raise ValueError(
        f"not a caption of the shapes grammar: expected e.g. {caption_en(Facts(1, ((0, 0, 5), (1, 4, 1)), (3,)))!r}, "
        f"got {text!r}: write it with caption_en or caption_ru"
    )


def canonical(facts: Facts) -> Facts:
    """The one form of all facts of equal meaning: one relation is "above" or "left of", two are in rising order.

    One counted object is an uncounted one; everything else is returned as it is.
    """
    if facts.counted and len(facts.objects) == 1:
        return Facts(facts.background, facts.objects)
    if len(facts.relations) == 1 and facts.relations[0] % 2:
        return Facts(facts.background, facts.objects[::-1], (facts.relations[0] - 1,))
    if len(facts.relations) == 2:
        clauses = sorted(zip(facts.relations, facts.objects[1:], strict=True))
        others, relations = tuple(thing for _, thing in clauses), tuple(relation for relation, _ in clauses)
        return Facts(facts.background, facts.objects[:1] + others, relations)
    return facts


def same_meaning(a: Facts, b: Facts) -> bool:
    """Whether two facts describe the same scenes."""
    return canonical(a) == canonical(b)


def wrong_captions(facts: Facts, rng: np.random.Generator) -> dict[str, Facts]:
    """Minimal false facts by kind (WRONG_KINDS); kinds that do not apply, or would stay true, are left out.

    Counted objects change together, and have the kind "count": one more or one fewer.
    """
    return {kind: wrong for kind, wrong in _edits(facts, rng) if not same_meaning(wrong, facts)}


def _edits(facts: Facts, rng: np.random.Generator) -> Iterator[tuple[str, Facts]]:
    ground, things, relations, counted = facts.background, facts.objects, facts.relations, facts.counted
    if relations:
        i, j = (0, 1) if len(things) == 2 else rng.permutation(len(things))[:2].tolist()
        for kind, field in (("swap colours", 1), ("swap shapes", 2), ("swap sizes", 0)):
            swapped = list(things)
            swapped[i] = _change(things[i], field, things[j][field])
            swapped[j] = _change(things[j], field, things[i][field])
            yield kind, Facts(ground, tuple(swapped), relations)
        yield from ((kind, Facts(ground, things, wrong)) for kind, wrong in _relation_edits(relations, rng))
    used = {ground, *(thing[1] for thing in things)}
    free = [c for c in range(len(COLOURS)) if c not in used]
    for kind, field in (("one colour", 1), ("one shape", 2), ("one size", 0)):
        slot = 0 if counted else int(rng.integers(len(things)))
        old = things[slot][field]
        others = free if field == 1 else [v for v in range(len(SHAPES if field else SIZES)) if v != old]
        new = _change(things[slot], field, int(rng.choice(others)))
        changed = (new,) * len(things) if counted else things[:slot] + (new,) + things[slot + 1 :]
        yield kind, Facts(ground, changed, relations, counted)
    yield "background", Facts(int(rng.choice(free)), things, relations, counted)
    if relations:
        yield "drop an object", Facts(ground, things[:-1], relations[:-1])
    if counted:
        near = [n for n in (len(things) - 1, len(things) + 1) if 1 <= n <= len(NUMBERS)]
        yield "count", Facts(ground, things[:1] * int(rng.choice(near)), (), True)


def _relation_edits(relations: tuple[int, ...], rng: np.random.Generator) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Two relations lie on different axes, so that exchanging them puts both on the other one."""
    if len(relations) == 1:
        yield "opposite relation", (relations[0] ^ 1,)
        yield "other axis", ((relations[0] // 2 * 2 + 2 + int(rng.integers(2))) % 4,)
    else:
        k = int(rng.integers(2))
        yield "opposite relation", tuple(r ^ (i == k) for i, r in enumerate(relations))
        yield "other axis", relations[::-1]


def _change(thing: tuple[int, int, int], field: int, value: int) -> tuple[int, int, int]:
    return tuple(value if i == field else old for i, old in enumerate(thing))  # type: ignore[return-value]
