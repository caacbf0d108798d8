"""The suite that judges a text-to-image model on `shapes`: its pictures, its tokenizer and its CLIP.

Pictures are painted through the very pipeline that users run and judged by `shapes_checker`, on compositions that
training never shows (`shapes_splits`). One-sample and best-of-N figures stand apart: the first is what the prior does,
the second what it does with its CLIP's help. Merge the results for `report` and `headline`:

    result = evaluate(model, candidates=8) | {"tokenizer": tokenizer_rate(model), "clip": clip_rate(model)}

B pictures of a batch, S image side, D size of CLIP's embedding.

It does not know how the model was trained.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...pipeline import checkpoint
from ...pipeline.images import to_uint8
from ...pipeline.known_models import find_model
from ...pipeline.recipe import Recipe
from ...pipeline.text_to_image import TextToImage
from ..data.shapes import JITTER, ShapesSource
from ..data.shapes_captions import LANGUAGES, caption, wrong_captions
from ..data.shapes_scenes import Facts
from ..data.shapes_splits import TEST_COUNTS, TESTS, test_captions
from ..objectives.dvae import codebook_use
from . import reports
from .reports import Result, check_tests, columns_of, percent, ranking_line, rates_of, rounded, suffix_of, title
from .shapes_checker import FAILURES, check
from .statistics import mcnemar, mean_rate, rate

HELD_OUT = ("S2a", "S2b", "S2c")  # S2 is the mean over these
SEED_STRIDE = 2**20  # between the captions' seeds, so that no candidate's noise is met twice
_CHUNK = 64
_NUMBER = {test: i for i, test in enumerate(TEST_COUNTS)}

Model = str | Path | TextToImage
Verdicts = dict[str, list[set[str]]]  # by column, what fails in each picture


@dataclass(frozen=True)
class Prompt:
    """One caption of a test, and the seed of its candidate 0."""

    facts: Facts
    language: str
    seed: int

    @property
    def text(self) -> str:
        """The caption."""
        return caption(self.facts, self.language)


def prompts(test: str, seed: int = 0, count: int | None = None) -> list[Prompt]:
    """The captions of a test in order, the first `count` of them if given; each has its own seed.

    S1: 500 over its 240 meanings, each in English, then in Russian, and the first 20 again with other seeds. The other
    tests: every meaning once, English and Russian in turn. Raises ValueError for an unknown test or a count below 1.
    """
    check_tests([test], TEST_COUNTS, count)
    facts = test_captions(test)
    if test == "S1":
        spoken = list(islice(cycle((f, language) for f in facts for language in LANGUAGES), TEST_COUNTS[test]))
    else:
        spoken = list(zip(facts, cycle(LANGUAGES), strict=False))
    first = sum(list(TEST_COUNTS.values())[: _NUMBER[test]])
    return [Prompt(f, t, seed + SEED_STRIDE * (first + i)) for i, (f, t) in enumerate(spoken[:count])]


def evaluate(
    model: Model,
    *,
    tests: Sequence[str] = TESTS,
    per_test: int | None = None,
    candidates: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **knobs: Any,
) -> Result:
    """Paints every caption of the tests and judges the pictures.

    model: a shipped name or a folder, loaded on the CPU, or a loaded system. tests: keys of TEST_COUNTS. per_test: the
    first captions of each test only. candidates: N; one_sample judges candidate 0, best_of_n the one of N that CLIP
    ranks first. progress: called with the captions judged and in all. knobs: of the pipeline. The result holds only
    what JSON can:

    tests.<test>.<column>: n, accepted, rate, interval, failures by fact, and the same by languages
    S2.<column>: rate and interval of the mean over a, b, c, where all three were asked (see `statistics.mean_rate`)
    ranking: McNemar's test of one_sample against best_of_n over all captions of a, b, c (see `statistics.mcnemar`)

    Raises ValueError for unknown tests, numbers below 1, or candidates > 1 without a CLIP, and as loading does.
    """
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}")
    check_tests(tests, TEST_COUNTS, per_test)
    system = _system(model)
    if candidates > 1 and system.scorer is None:
        raise ValueError(f"best of {candidates} needs a CLIP, the model has none; train it, or set candidates=1")
    asked = {test: prompts(test, seed, per_test) for test in tests}
    total, done = sum(map(len, asked.values())), 0
    judged: dict[str, Verdicts] = {test: {} for test in tests}
    facts: dict[str, Any] = {}
    parts = [(test, part) for test in tests for part in _chunks(asked[test])]
    for test, part in parts:
        verdicts, facts = _judge(system, part, candidates, knobs)
        for column, more in verdicts.items():
            judged[test].setdefault(column, []).extend(more)
        done += len(part)
        if progress is not None:
            progress(done, total)
    result: Result = {key: facts[key] for key in ("model", "model_hash", "device", "dtype", "knobs")}
    return result | {"seed": seed, "candidates": candidates} | _summary(asked, judged)


def _judge(
    system: TextToImage, part: list[Prompt], candidates: int, knobs: dict[str, Any]
) -> tuple[Verdicts, dict[str, Any]]:
    """What fails in the pictures of each column, and the facts of one painting."""
    texts, seeds = [prompt.text for prompt in part], [prompt.seed for prompt in part]
    painted = system(texts, seed=seeds, candidates=candidates, keep=candidates, **knobs)
    columns = reports.by_column(painted, candidates)
    wanted = [prompt.facts for prompt in part]
    verdicts = {
        column: check(np.stack([np.asarray(painting.image) for painting in chosen]), wanted)  # (B, S, S, 3)
        for column, chosen in columns.items()
    }
    return verdicts, painted[0].facts


def _summary(asked: dict[str, list[Prompt]], judged: dict[str, Verdicts]) -> Result:
    tests: Result = {}
    for test, columns in judged.items():
        spoken = [prompt.language for prompt in asked[test]]
        tests[test] = {column: _tally(verdicts, spoken) for column, verdicts in columns.items()}
    result: Result = {"tests": tests}
    if set(HELD_OUT) <= set(tests):
        names = list(tests[HELD_OUT[0]])
        result["S2"] = {column: mean_rate([tests[test][column] for test in HELD_OUT]) for column in names}
        if "best_of_n" in names:
            one, best = ([not v for test in HELD_OUT for v in judged[test][column]] for column in names)
            result["ranking"] = mcnemar(one, best)
    return result


def _tally(verdicts: list[set[str]], spoken: list[str] | None = None) -> Result:
    """Rate and failures of a list of verdicts; with the language of each, the same by language."""
    counts = Counter(fact for verdict in verdicts for fact in verdict)
    tally = rate(sum(not verdict for verdict in verdicts), len(verdicts))
    tally["failures"] = {fact: counts[fact] for fact in FAILURES}
    if spoken is not None:
        pairs = list(zip(verdicts, spoken, strict=True))
        tally["languages"] = {name: _tally([v for v, s in pairs if s == name]) for name in LANGUAGES}
    return tally


@torch.inference_mode()
def tokenizer_rate(
    model: Model,
    *,
    tests: Sequence[str] = ("S1", *HELD_OUT),
    per_test: int | None = None,
    seed: int = 0,
    device: Any = "cpu",
) -> Result:
    """How often a true picture of a test still shows its facts after encoding and decoding: what bounds every prior.

    model: as of `evaluate`, or a folder without a prior; it is a folder that is loaded on the device.
    -> tests.<test> and, over all pictures: n, accepted, rate, interval, failures; psnr in dB, of the mean squared error
    over all 8-bit pictures (None where they are equal); codes_used, the share of the codebook that occurs; perplexity,
    the exponential of the entropy of the codes (both None for latents). Raises ValueError as `evaluate` does.
    """
    if isinstance(model, str | Path):
        recipe, tokenizer = checkpoint.load_tokenizer(find_model(str(model)), device)
    else:
        recipe, tokenizer = model.recipe, model.parts["tokenizer"]
    codes = tokenizer.spec.kind == "codes"
    counts = torch.zeros(tokenizer.spec.vocabulary if codes else 0, dtype=torch.int64)
    errors: list[float] = []
    judged: dict[str, list[set[str]]] = {test: [] for test in tests}
    for test, _, image, facts in _pictures(recipe, tests, per_test, seed):
        z = tokenizer.encode(image.to(next(tokenizer.parameters())))
        if codes:
            counts += torch.bincount(z.flatten().cpu(), minlength=len(counts))
        true, again = to_uint8(image), to_uint8(tokenizer.decode(z))  # (B, S, S, 3)
        errors += (true.double() - again.double()).square().mean((1, 2, 3)).tolist()
        judged[test] += check(again.numpy(), facts)
    used = codebook_use(counts.double()) if codes else {}
    return {
        "tests": {test: _tally(verdicts) for test, verdicts in judged.items()},
        **_tally([verdict for verdicts in judged.values() for verdict in verdicts]),
        "psnr": reports.psnr(errors),
        "codes_used": float(used["usage"]) if codes else None,
        "perplexity": float(used["perplexity"]) if codes else None,
    }


@torch.inference_mode()
def clip_rate(model: Model, *, tests: Sequence[str] = HELD_OUT, per_test: int | None = None, seed: int = 0) -> Result:
    """How often the model's CLIP scores a true picture's caption strictly above all its minimal wrong captions.

    Captions are English and Russian in turn, each against up to ten wrong ones of its language (`wrong_captions`).
    -> n, accepted, rate, interval; the same under tests, languages, and kinds (against the wrong caption of that kind
    alone). Raises ValueError for a model without a CLIP, and as `evaluate` does.
    """
    system = _system(model)
    if "clip" not in system.parts:
        raise ValueError("the model has no CLIP to judge; train its clip stage")
    won: list[tuple[str, str, dict[str, bool]]] = []
    for test, positions, image, facts in _pictures(system.recipe, tests, per_test, seed):
        spoken = [LANGUAGES[position % len(LANGUAGES)] for position in positions]
        wrong = [
            wrong_captions(f, np.random.default_rng([seed % 2**64, _NUMBER[test], position]))
            for f, position in zip(facts, positions, strict=True)
        ]
        texts = [[caption(g, s) for g in (f, *w.values())] for f, w, s in zip(facts, wrong, spoken, strict=True)]
        scores = _clip_scores(system, image, texts)
        for language, kinds, (true, *others) in zip(spoken, wrong, scores, strict=True):
            won.append((test, language, {kind: true > score for kind, score in zip(kinds, others, strict=True)}))
    kinds_met = dict.fromkeys(kind for _, _, kinds in won for kind in kinds)
    return {
        **_wins(won),
        "tests": {name: _wins([w for w in won if w[0] == name]) for name in tests},
        "languages": {name: _wins([w for w in won if w[1] == name]) for name in LANGUAGES},
        "kinds": {kind: _share([w[2][kind] for w in won if kind in w[2]]) for kind in kinds_met},
    }


def _wins(won: list[tuple[str, str, dict[str, bool]]]) -> Result:
    return _share([all(kinds.values()) for _, _, kinds in won])


def _share(right: list[bool]) -> Result:
    return rate(sum(right), len(right))


def _clip_scores(system: TextToImage, image: Tensor, texts: list[list[str]]) -> list[list[float]]:
    """The cosines of each picture of image (B, 3, S, S) with its own captions; a picture is encoded once."""
    clip, flat = system.parts["clip"], [text for row in texts for text in row]
    weight = next(clip.parameters())
    assert system.captions is not None
    tokens = clip.frame(*system.captions.encode(flat)).to(weight.device)
    pictures = clip.encode_image(image.to(weight), normalize=True).float()  # (B, D)
    counts = [len(row) for row in texts]
    repeated = pictures.repeat_interleave(torch.tensor(counts, device=weight.device), dim=0)
    cosines = (repeated * clip.encode_text(tokens, normalize=True).float()).sum(1)
    return [part.tolist() for part in cosines.split(counts)]


def _pictures(
    recipe: Recipe, tests: Sequence[str], per_test: int | None, seed: int
) -> Iterator[tuple[str, list[int], Tensor, list[Facts]]]:
    """True pictures, with the jitter of the colours of the recipe's data, in batches.

    -> the test, the positions in it, image (B, 3, S, S) in [-1, 1], facts.
    """
    check_tests(tests, TEST_COUNTS, per_test)
    jitter = recipe.training.get("data", {}).get("jitter", JITTER)
    for test in tests:
        source = ShapesSource(recipe.image_size, seed, split=test, jitter=jitter)
        for part in _chunks(range(source.size or 0)[:per_test]):
            positions = list(part)
            yield test, positions, source.read(positions).image, source.facts(positions)


def _chunks(entries: Any) -> Iterator[Any]:
    return (entries[start : start + _CHUNK] for start in range(0, len(entries), _CHUNK))


def _system(model: Model) -> TextToImage:
    return TextToImage.load(model) if isinstance(model, str | Path) else model


def headline(result: Result) -> dict[str, float]:
    """The figures for a model's card, rounded to 4 digits: {"S1": 0.91, "S2": 0.87, "S2 best of 8": 0.95, ...}."""
    rates: dict[str, float | None] = {}
    for column in columns_of(result):
        rates |= rates_of(result, column)
        if "S2" in result:
            rates["S2" + suffix_of(result, column)] = result["S2"][column]["rate"]
    rates |= {part: result[part]["rate"] for part in ("tokenizer", "clip") if part in result}
    return rounded(rates)


def report(result: Result) -> str:
    """The figures as text for people: rates with 95 % intervals, what failed, ranking, tokenizer and CLIP."""
    text = io.StringIO()
    console = Console(file=text, width=120, markup=False, highlight=False)
    console.print(title(result))
    console.print(_rate_table(result), _failure_table(result))
    if "ranking" in result:
        console.print(ranking_line(result["ranking"], result["candidates"]))
    if "tokenizer" in result:
        console.print(tokenizer_line(result["tokenizer"]))
    if "clip" in result:
        part = result["clip"]
        console.print(f"CLIP: {percent(part)} of {part['n']} captions beat all their wrong ones; one by one:")
        console.print("\n".join(f"  {kind:17} {percent(won)}" for kind, won in part["kinds"].items()))
    return text.getvalue()


def tokenizer_line(part: Result) -> str:
    """The result of `tokenizer_rate` as a line for people."""
    line = f"tokenizer: {percent(part)} of {part['n']} pictures keep their facts, {reports.decibels(part['psnr'])}"
    if part["codes_used"] is None:
        return line
    return f"{line}, {part['codes_used']:.1%} of the codes in use, perplexity {part['perplexity']:.1f}"


def _rate_table(result: Result) -> Table:
    table = Table("test", "n", box=box.SIMPLE)
    for words in columns_of(result).values():
        for heading in (words, *LANGUAGES):
            table.add_column(heading, justify="right")
    for test, columns in result["tests"].items():
        row = [test, str(columns["one_sample"]["n"])]
        for tally in columns.values():
            row += [percent(tally), *(percent(tally["languages"][name]).split(" [")[0] for name in LANGUAGES)]
        table.add_row(*row)
    if "S2" in result:
        table.add_row("S2", "", *(cell for mean in result["S2"].values() for cell in (percent(mean), "", "")))
    return table


def _failure_table(result: Result) -> Table:
    table = Table("failures", "", *FAILURES, box=box.SIMPLE)
    for test, columns in result["tests"].items():
        for column, words in columns_of(result).items():
            table.add_row(test, words, *(str(columns[column]["failures"][fact]) for fact in FAILURES))
    return table
