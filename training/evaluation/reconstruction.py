"""The ruler of tokenizers: how like themselves pictures are after encoding and decoding. One row for each tokenizer.

All figures are of 8-bit pictures that training does not show.

- psnr: dB, of the mean squared error over all pictures.
- ssim: structural similarity (Wang 2004, doi:10.1109/TIP.2003.819861) of each colour, averaged.
- kid: squared maximum mean discrepancy (Binkowski 2018, arXiv:1801.01401, section 3 and equation 4) between features of
  true pictures and of other pictures' reconstructions: no picture meets its own, so that the estimate is unbiased. The
  features are EfficientNet-Lite0's, which no loss uses; the name "KID-lite0" is to tell it from Inception's.
- facts: how often `shapes_checker` still finds the facts of a picture of shapes; what bounds every prior.
- usage, perplexity: of the codebook over all pictures.
- seen: psnr of what the tokenizers were given, where that was corrupted.

N pictures, B of a batch, S their side, D size of a feature.

It does not know how a tokenizer was trained, nor priors.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from ...pipeline import checkpoint
from ...pipeline.images import to_uint8
from ...pipeline.known_models import find_model
from .. import corruptions
from ..data.shapes import JITTER, ShapesSource
from ..data.shapes_scenes import Facts
from ..features import RULER, EfficientNetLite, ruler
from ..objectives.dvae import codebook_use
from ..run import training_of
from ..sources import held_out, validation_of
from ..stream import ShardSource
from .reports import Result, decibels, percent, psnr
from .shapes_checker import check
from .shapes_suite import HELD_OUT
from .statistics import rate

SIDE = 128  # to which smaller pictures are enlarged before their features are read
SUBSETS, LARGEST = 50, 1000  # of KID, and the most pictures of one
_TESTS = ("S1", *HELD_OUT)
_CHUNK = 64

Pictures = Iterator[tuple[Tensor, list[Facts] | None]]  # (B, 3, S, S) in [-1, 1], and what they show


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity of pictures (B, S, S, 3) uint8: a mean over colours and places for each, float64 (B,).

    As published (equation 13): an 11 x 11 Gaussian window of deviation 1.5, wholly inside the picture, K1 = 0.01,
    K2 = 0.03. Raises ValueError for pictures below 11 pixels a side or of different shapes.
    """
    if first.shape != second.shape or first.dim() != 4 or min(first.shape[1:3]) < 11:
        raise ValueError(
            f"ssim needs pictures (B, S, S, 3) of one shape, at least 11 pixels a side, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}; compare larger ones"
        )
    x, y = (pictures.double().movedim(3, 1).flatten(0, 1)[:, None] for pictures in (first, second))  # (3 B, 1, S, S)
    window = torch.exp(-torch.arange(-5.0, 6.0, dtype=torch.float64).square() / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, 1, 11)

    def local(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, window), window.mT)

    mean_x, mean_y = local(x), local(y)
    variances = local(x * x) - mean_x.square() + local(y * y) - mean_y.square()
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    likeness = likeness / ((mean_x.square() + mean_y.square() + c1) * (variances + c2))
    return likeness.view(len(first), -1).mean(dim=1)


def squared_mmd(first: Tensor, second: Tensor) -> float:
    """The unbiased estimate of the squared MMD (Binkowski 2018, equation 4) of features (N, D) and (M, D).

    The kernel is (x . y / D + 1)^3. It can be negative. Raises ValueError for fewer than 2 features.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"KID needs at least 2 pictures of each, got {len(first)} and {len(second)}; take more")

    def total(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1).pow(3)

    n, m = len(first), len(second)
    within = [kernel.sum() - kernel.trace() for kernel in (total(first, first), total(second, second))]
    between = total(first, second).mean()
    return float(within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * between)


def kid(true: Tensor, again: Tensor, seed: int = 0) -> tuple[float, float]:
    """Mean and deviation of `squared_mmd` over random subsets; true, again (N, D): features of the same N pictures.

    Each subset has two halves of min(LARGEST, N / 2) pictures: of one the true features, of the other the rest.
    """
    half, draws, found = min(LARGEST, len(true) // 2), torch.Generator().manual_seed(seed), []
    for _ in range(SUBSETS):
        order = torch.randperm(len(true), generator=draws)
        found.append(squared_mmd(true[order[:half]].double(), again[order[half : 2 * half]].double()))
    return float(torch.tensor(found).mean()), float(torch.tensor(found).std())


def features_of(network: EfficientNetLite, pictures: Tensor, device: Any = "cpu") -> Tensor:
    """Pictures (B, S, S, 3), uint8 -> what the ruler's network reads of them, (B, D), on the CPU."""
    image = pictures.to(device).movedim(3, 1).float() / 127.5 - 1
    if image.shape[-1] < SIDE:
        image = F.interpolate(image, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return network.pooled(image).cpu()


def kid_words(mean: float, deviation: float) -> str:
    """KID times 1,000."""
    return f"{1000 * mean:.2f} +- {1000 * deviation:.2f}"


class _Tokenizer:
    """A tokenizer from its model folder, and what was found of it so far."""

    def __init__(self, name: str, device: Any) -> None:
        folder = find_model(name)
        self.name = name
        self.recipe, self.network = checkpoint.load_tokenizer(folder, device)
        self.spec, self.entry = self.network.spec, checkpoint.read_card(folder)["parts"]["tokenizer"]
        self.data = self.recipe.training.get("data", {})
        self.counts = torch.zeros(
            getattr(getattr(self.network, "codes", self.spec), "vocabulary", 0), dtype=torch.int64
        )
        self.errors: list[float] = []
        self.likeness: list[float] = []
        self.kept: list[bool] = []
        self.features: list[Tensor] = []

    def reconstruct(self, image: Tensor) -> Tensor:
        """image (B, 3, S, S) -> pictures (B, S, S, 3), uint8; counts the codes."""
        z = self.network.encode(image.to(next(self.network.parameters())))
        if len(self.counts):
            codes = z if self.spec.kind == "codes" else self.network.nearest(z)
            self.counts += torch.bincount(codes.flatten().cpu(), minlength=len(self.counts))
        return to_uint8(self.network.decode(z))

    def judge(self, true: Tensor, again: Tensor, facts: list[Facts] | None) -> None:
        """Pictures (B, S, S, 3) and their reconstructions."""
        self.errors += _squared_errors(true, again)
        self.likeness += ssim(true, again).tolist()
        self.kept += [] if facts is None else [not failures for failures in check(again.numpy(), facts)]

    def result(self, true: Tensor, seed: int) -> Result:
        """Its row; true (N, D): features of the pictures."""
        mean, deviation = kid(true, torch.cat(self.features), seed)
        identity = self.entry.get("identity", {})
        row: Result = {
            "model": self.name,
            "hash": self.entry["hash"],
            "latent": list(self.spec.shape),
            "parameters": sum(weight.numel() for weight in self.network.parameters()),
            "trained_on": identity["steps"] * identity["global_batch"] if "steps" in identity else None,
            "psnr": psnr(self.errors),
            "ssim": sum(self.likeness) / len(self.likeness),
            "kid": mean,
            "kid_deviation": deviation,
        }
        if self.kept:
            row["facts"] = rate(sum(self.kept), len(self.kept))
        if len(self.counts):
            used = codebook_use(self.counts.double())
            row |= {"vocabulary": len(self.counts)} | {name: float(value) for name, value in used.items()}
        return row


def _squared_errors(first: Tensor, second: Tensor) -> list[float]:
    """Of each of some pictures (B, S, S, 3), in 8-bit levels."""
    errors: list[float] = (first.double() - second.double()).square().mean((1, 2, 3)).tolist()
    return errors


def _pictures(tokenizers: list[_Tokenizer], data: Path | None, count: int, seed: int) -> tuple[int, str, Pictures]:
    """The number of pictures, what they are, and they in batches. Raises ValueError where not all read the same."""
    sizes = {tokenizer.recipe.image_size for tokenizer in tokenizers}
    jitters = {tokenizer.data.get("jitter", JITTER) for tokenizer in tokenizers}
    kinds = {tokenizer.data.get("kind", "unknown pictures") for tokenizer in tokenizers}
    if len(sizes) > 1 or data is None and len(jitters) > 1:
        raise ValueError(
            f"tokenizers in one table give back the same pictures, got sizes {sorted(sizes)} px and jitters "
            f"{sorted(jitters)} of the colours; judge those that differ alone"
        )
    if data is None and kinds not in ({"shapes"}, {"digits"}):
        raise ValueError(
            f"without --data tokenizers of shapes alone or of digits alone are judged, got some of {sorted(kinds)}; "
            "name shards of pictures to give back with --data FOLDER"
        )
    size = sizes.pop()
    if data is not None or kinds == {"digits"}:
        source, what = _held_out_digits(tokenizers) if data is None else _of_shards(tokenizers, data, size, seed)
        total = min(count, source.size)
        return total, what, _of_source(source, total)
    tests = [ShapesSource(size, seed, split=test, jitter=jitters.copy().pop()) for test in _TESTS]
    each = min(count // len(tests), min(test.size or 0 for test in tests))
    return each * len(tests), "shapes " + ", ".join(_TESTS), _of_shapes(tests, each)


def _chunks(count: int) -> list[range]:
    return [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]


def _of_shards(tokenizers: list[_Tokenizer], data: Path, size: int, seed: int) -> tuple[Any, str]:
    """All pictures of a folder; where tokenizers were trained on it, those that they held out.

    Raises ValueError where they were trained on all of it, or held out other shares.
    """
    found, names = [], []
    for tokenizer in tokenizers:
        trained, rest = held_out(tokenizer.recipe, {tokenizer.entry.get("identity", {}).get("data")}, data)
        if trained:
            found.append(rest)
            names.append(tokenizer.name)
    if not found:
        return ShardSource(data, size, seed), str(data)
    if found[0] is None or len({None if each is None else each.fingerprint for each in found}) > 1:
        raise ValueError(
            f"{', '.join(names)}: trained on the pictures of {data}, or on different parts of them; name shards that "
            "were held out, or judge those that differ alone"
        )
    return found[0], f"{data}, held out of training"


def _held_out_digits(tokenizers: list[_Tokenizer]) -> tuple[Any, str]:
    """What none of them was trained on. Raises ValueError where they hold out other shares, or none."""
    data = [training_of(tokenizer.recipe).data for tokenizer in tokenizers]
    shares = sorted({each.validation_share for each in data})
    found = validation_of(tokenizers[0].recipe, data[0]) if len(shares) == 1 else None
    if found is None:
        raise ValueError(
            f"tokenizers of digits are judged on what all of them held out, got validation_share {shares}; judge those "
            "that differ alone, or name shards of pictures with --data FOLDER"
        )
    return found, "digits that are held out"


def _of_source(source: Any, count: int) -> Pictures:
    for part in _chunks(count):
        batch = source.read(part)
        yield batch.image[batch.weight > 0], None


def _of_shapes(tests: list[ShapesSource], each: int) -> Pictures:
    for test in tests:
        for part in _chunks(each):
            yield test.read(part).image, test.facts(part)


@torch.inference_mode()
def evaluate(
    models: Sequence[str],
    *,
    data: Path | None = None,
    count: int = 2000,
    seed: int = 0,
    device: Any = "cpu",
    corruption: tuple[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Judges the tokenizers of model folders on the same pictures; a model needs no prior.

    models: shipped names or folders. data: a folder of shards, of which one that was trained on gives what it held out;
    None for the tests of shapes, or the digits that training held out.
    count: of pictures, at most. corruption: what the tokenizers see pictures through, see `corruptions.corrupt`,
    within the range of pictures; they are judged by the pictures themselves. progress: called with the pictures read
    and in all. Returns {"pictures", "n", "seed", "features", "tokenizers": [see the module's legend, and parameters,
    latent, trained_on: pictures seen]}; what a tokenizer does not have (facts, codes) is left out, psnr is None where
    nothing differs; with a corruption also that as {"kind", "level"} and `seen`. Raises ValueError for tokenizers that
    do not read the same pictures, or did not hold out the same, fewer than 4 pictures, a corruption that is none, and
    as loading does.
    """
    if corruption is not None and (wrong := corruptions.problem(*corruption)):
        raise ValueError(wrong)
    tokenizers = [_Tokenizer(name, device) for name in models]
    total, what, pictures = _pictures(tokenizers, data, count, seed)
    if total < 4:
        raise ValueError(f"the ruler needs at least 4 pictures, got {total}; ask for more with --count")
    judge, features = ruler().to(device), []
    spoiled: list[float] = []  # squared errors of what is seen

    for image, facts in pictures:
        true = to_uint8(image)
        features.append(features_of(judge, true, device))
        if corruption is not None:
            samples = torch.arange(len(spoiled), len(spoiled) + len(image))
            image = corruptions.corrupt(image, *corruption, seed, 0, samples)
            spoiled += _squared_errors(true, to_uint8(image))
        for tokenizer in tokenizers:
            again = tokenizer.reconstruct(image)
            tokenizer.judge(true, again, facts)
            tokenizer.features.append(features_of(judge, again, device))
        if progress is not None:
            progress(sum(map(len, features)), total)
    known = torch.cat(features)
    rows = [tokenizer.result(known, seed) for tokenizer in tokenizers]
    found = {"pictures": what, "n": len(known), "seed": seed, "features": RULER, "tokenizers": rows}
    if corruption is None:
        return found
    return found | {"corruption": dict(zip(("kind", "level"), corruption, strict=True)), "seen": psnr(spoiled)}


def report(result: Result) -> str:
    """The table for people."""
    text = io.StringIO()
    console = Console(file=text, width=140, markup=False, highlight=False)
    console.print(f"{result['n']} pictures of {result['pictures']}, seed {result['seed']}; KID of {result['features']}")
    if spoiled := result.get("corruption"):
        seen = f"seen through {spoiled['kind']} of {spoiled['level']:g}, which leaves {decibels(result['seen'])}"
        console.print(f"{seen}; judged by the pictures themselves")
    table = Table(box=box.SIMPLE)
    table.add_column("tokenizer", overflow="fold")
    table.add_column("latent", no_wrap=True)
    for heading in ("weights", "trained on", "PSNR", "SSIM", "KID x 1000", "facts kept", "codes used", "perplexity"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["tokenizers"]:
        grid = "x".join(map(str, row["latent"]))
        table.add_row(
            row["model"],
            f"{grid} of {row['vocabulary']}" if "vocabulary" in row else grid,
            f"{row['parameters']:,}",
            "-" if row["trained_on"] is None else f"{row['trained_on']:,}",
            decibels(row["psnr"]),
            f"{row['ssim']:.4f}",
            kid_words(row["kid"], row["kid_deviation"]),
            percent(row["facts"]) if "facts" in row else "-",
            f"{row['usage']:.1%}" if "usage" in row else "-",
            f"{row['perplexity']:.1f}" if "perplexity" in row else "-",
        )
    console.print(table)
    return text.getvalue()
