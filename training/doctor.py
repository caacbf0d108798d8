"""The run doctor: reads a log and says what is wrong with a run, on what evidence, and what to do.

Rules are pure functions of one stage's log. A rule waits until there is enough to judge by, and speaks of how things
stand at the end of the log, so that what has healed is not told. What the rules read beside the loop's own scalars:

    valid/usage, valid/perplexity       share of codes in use, exp of their entropy, over the whole validation set; of a
                                        run without one, tokenizer/... over the steps since the line before
    valid/counts_per_code               how many codes these two rest on, for each entry of the codebook
    valid/active_units                  share of latent units whose posterior mean varies over the data by more than
                                        0.01 (Burda 2016, arXiv:1509.00519, section 5.2)
    valid/diversity                     how far what is generated is spread, where what is real is by 1
    tokenizer/adaptive                  how many times as large the discriminator's gradient is made
    discriminator/accuracy              how often real and fake are told apart; in its place real_logits and fake_logits
    latent_std, of validation or any    standard deviation of the latents as a prior reads them
        network
    X/chance beside X/loss              the loss of a model that knows nothing (also image_chance and image_loss)
    valid/caption_gain                  by how much another sample's caption makes valid/caption_error worse, or the
                                        headline metric where there is none
    valid/ema_gain                      by how much averaged weights make the headline metric better, beside
                                        valid/ema_gain_error, the standard error of this mean over samples

It does not know the models.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .history import History, read
from .log import Log

# A rule speaks from so many steps on, and at this share of the stage, or at half of it on what comes late; means are
# over so many lines.
_STEPS, _SHARE, _HALF, _LINES = 20, 0.2, 0.5, 10
_USAGE, _PERPLEXITY_LEFT, _COUNTS = 0.5, 1 / 3, 1  # usage of that of even codes; of fewer counts a code nothing is said
_ACTIVE = 0.1
_WINS, _HINGE = 0.97, 0.1  # a hinge loss of 0.1, where chance has 1, is mostly of pictures beyond its margin
_DIVERSITY = 0.3
_AMPLIFIED = 5e3  # of 1e4, where the adaptive weight ends
_STD = (0.8, 1.25)
_CHANCE = 0.95
_GAIN = 0.005  # of what the caption makes worse
_YOUNG = 0.05  # of the headline metric
_LOST, _CLIPPED, _HEALED = 0.5, 0.9, 1000
_WAIT = 0.3


@dataclass(frozen=True)
class Finding:
    """One fault: its name, where it stands, the numbers that show it, and what to do."""

    name: str
    stage: str
    step: int
    seen: str
    advice: str


Found = Iterator[tuple[str, str, str]]


def examine(run: Path) -> list[Finding]:
    """The findings of a run folder or its log, by stage. Raises ValueError where there is no log."""
    return [finding for history in read(run).values() for finding in judge(history)]


def judge(history: History) -> list[Finding]:
    """The findings of one stage."""
    return [Finding(name, history.stage, history.step, *rest) for rule in RULES for name, *rest in rule(history)]


def watch(log: Log, step: int) -> None:
    """Warns of each finding of a stage once a run, on the terminal and as an event of the log."""
    if not log.enabled:
        return
    history = log.history
    told = {event.get("finding") for event in history.events if event["event"] == "finding"}
    for finding in judge(history):
        if finding.name not in told:
            message = f"warning: {finding.name}: {finding.seen}; {finding.advice}"
            log.event(step, "finding", message, finding=finding.name, seen=finding.seen, advice=finding.advice)


def main(run: Path, as_json: bool, tell: Callable[[str], object]) -> bool:
    """`kartina doctor`. Returns whether anything was found."""
    findings = examine(run)
    if findings or not as_json:
        tell(report(run, findings, as_json))
    return bool(findings)


def report(run: Path, findings: list[Finding], as_json: bool = False) -> str:
    """Each finding in three lines for people, or in one of JSON; where there is none, what was read."""
    if as_json:
        return "\n".join(json.dumps(asdict(finding), ensure_ascii=False) for finding in findings)
    if findings:
        blocks = (f"{f.stage} at step {f.step}: {f.name}\n  seen   {f.seen}\n  do     {f.advice}" for f in findings)
        return "\n".join(blocks)
    stages = ", ".join(f"{name} to step {history.step} of {history.steps}" for name, history in read(run).items())
    return f"nothing found ({stages})"


# --- the rules --------------------------------------------------------------------------------------------------------


def _ripe(history: History, share: float = _SHARE, since: int = 0) -> bool:
    """Whether this share of the steps is done, counted from where the stage began anew, and from `since`."""
    begin = max(_begin(history), since)
    return history.step - begin >= max(_STEPS, share * (history.steps - begin))


def _begin(history: History) -> int:
    """Where the stage began anew, if it has by now; codes mean nothing before."""
    return int(history.facts.get("restart_step") or 0)


def _recent(history: History, name: str) -> float | None:
    """The mean of the last quarter of a curve, of 10 to 100 lines; None where there are fewer."""
    values = [value for _, value in history.curve(name, _begin(history))]
    return statistics.fmean(values[-min(100, max(_LINES, len(values) // 4)) :]) if len(values) >= _LINES else None


def codebook_collapse(history: History) -> Found:
    begin = _begin(history)
    of, where, unknown = "valid", "the validation set", math.inf  # counts, in logs of earlier versions
    if history.last("valid/usage", begin) is None:
        of, where, unknown = "tokenizer", "the steps of a line", 0.0
    usage, counts = history.last(f"{of}/usage", begin), history.last(f"{of}/counts_per_code", begin)
    counts = unknown if counts is None else counts
    if usage is None or not _ripe(history) or counts < _COUNTS:
        return
    expected = _USAGE * (1 - math.exp(-counts))  # codes that come alike leave some out by chance
    perplexities = [value for _, value in history.curve(f"{of}/perplexity", begin)] or [float("nan")]
    seen = f"{usage:.0%} of the codes occur in {where}, with a perplexity of {perplexities[-1]:.1f}"
    advice = (
        "start the codes from k-means (stages.tokenizer.objective.kmeans=0.05, of a dVAE autoencoder=0.2), revive dead "
        "ones (restart_every=50; of a dVAE raise kl_weight), or lower num_codes"
    )
    if usage < expected:
        yield "codebook collapse", f"{seen}; at least {expected:.0%} are expected", advice
    elif perplexities[-1] < _PERPLEXITY_LEFT * max(perplexities):
        yield "codebook collapse", f"{seen}, which was {max(perplexities):.1f} before", advice


def posterior_collapse(history: History) -> Found:
    active = history.last("valid/active_units")
    if active is not None and active < _ACTIVE and _ripe(history):
        seen = f"{active:.0%} of the latent units vary with the picture; at least {_ACTIVE:.0%} are expected"
        yield "posterior collapse", seen, "lower the KL weight, raise it more slowly from 0, or allow free bits"


def discriminator_wins(history: History) -> Found:
    accuracy = _recent(history, "discriminator/accuracy")
    hinge = _recent(history, "discriminator/hinge")
    advice = (
        "lower stages.tokenizer.optimizers.discriminator.lr or objective.discriminator_weight, or let it begin later "
        "(discriminator_start)"
    )
    if not _ripe(history):
        return
    if accuracy is not None and accuracy > _WINS:
        seen = f"it tells real from fake in {accuracy:.1%} of the last samples; above {_WINS:.0%} it teaches little"
        yield "the discriminator wins", seen, advice
    elif hinge is not None and hinge < _HINGE:
        seen = f"its hinge loss is {hinge:.2g} over the last lines, 1 by chance; below {_HINGE:g} it teaches little"
        yield "the discriminator wins", seen, advice


def mode_collapse(history: History) -> Found:
    diversity = history.last("valid/diversity")
    heard = int(history.facts.get("ramp_end") or 0)  # before, no discriminator spreads anything
    if diversity is not None and diversity < _DIVERSITY and _ripe(history, _HALF, heard):
        yield (
            "mode collapse",
            f"what is generated is spread {diversity:.2g} times as far as what is real; {_DIVERSITY:g} is the least",
            "give the discriminator more learning rate than the generator (optimizers.discriminator.lr), or a larger "
            "global_batch, by which it sees what is missing",
        )


def discriminator_silent(history: History) -> Found:
    heard = history.curve("tokenizer/adaptive", _begin(history))
    if not heard or history.step - heard[0][0] < _SHARE * history.steps:  # at first it has little to say
        return
    adaptive = _recent(history, "tokenizer/adaptive")
    if adaptive is not None and adaptive > _AMPLIFIED:
        yield (
            "the discriminator says nothing",
            f"what the tokenizer hears of it is made {adaptive:,.0f} times as large, which is mostly noise",
            "keep its learning rate up (stages.tokenizer.optimizers.discriminator.decay=0), let it begin earlier "
            "(objective.discriminator_start), or leave the part out",
        )


def latent_scale(history: History) -> Found:
    for name in history.ending("latent_std"):
        std = history.last(name)
        if std is not None and not _STD[0] <= std <= _STD[1]:
            seen = f"{name} is {std:.3g}; the noise of diffusion fits latents of about 1, {_STD[0]} to {_STD[1]}"
            yield (
                "latent scale off",
                seen,
                "train the tokenizer's stage to its end, which measures it, then this one in another --run",
            )


def at_chance(history: History) -> Found:
    for chance_name in [name for name in sorted(history.curves) if name.endswith("chance")]:
        name = chance_name.removesuffix("chance") + "loss"
        loss, chance = _recent(history, name), _recent(history, chance_name)
        if loss is not None and chance is not None and loss > _CHANCE * chance and _ripe(history):
            seen = f"{name} is {loss:.3g} over the last lines; a model that knows nothing has {chance:.3g}"
            advice = "try ten times less or more learning rate, and see that a single batch can be learnt by heart"
            yield "loss at chance level", seen, advice


def caption_ignored(history: History) -> Found:
    name = "valid/caption_error" if "valid/caption_error" in history.curves else history.headline or ""
    gain, value = history.last("valid/caption_gain"), history.last(name)
    if gain is not None and value is not None and gain < _GAIN * abs(value) and _ripe(history, _HALF):
        seen = f"with another sample's caption {name} of {value:.3g} is only {gain:.2g} worse"
        advice = "lower caption_drop or condition_drop, and look at the previews: do captions fit their pictures?"
        yield "caption ignored", seen, advice


def ema_young(history: History) -> Found:
    gain, value = history.last("valid/ema_gain"), history.last(history.headline or "")
    noise = 3 * (history.last("valid/ema_gain_error") or 0.0)
    if gain is not None and value is not None and -gain > noise + _YOUNG * abs(value) and _ripe(history, _HALF):
        seen = f"{history.headline} is {value:.3g} with averaged weights, {-gain:.2g} worse than with live ones"
        decay = history.facts.get("ema", 0.0)
        advice = f"lower ema (now {decay:g}), or train longer: averages are exported, and lag behind what still moves"
        yield "averaged weights too young", seen, advice


def learning_rate(history: History) -> Found:
    name, advice = "learning rate too high", "lower optimizer.lr, and muon where it is set, three to ten times"
    returned = [event for event in history.events if event["event"] == "returned"]
    since = history.step - (returned[-1].get("reached", history.step) if returned else 0)
    if returned and since < max(_HEALED, _SHARE * history.steps):
        seen = f"steps were not finite so often that the run went back, {len(returned)} times"
        yield name, f"{seen}, last at step {returned[-1].get('reached', history.step)}", advice
        return
    networks = history.facts.get("networks", [])
    if len(networks) != 1 or not _ripe(history):  # losses of adversaries rise and fall with each other
        return
    ramp = int(history.facts.get("ramp_end") or 0)  # until then the loss rises with its weights
    values = [value for _, value in history.curve(f"{networks[0]}/total", max(_begin(history), ramp))]
    if len(values) < 2 * _LINES or _is_best_now(history):
        return
    losses = _smooth(values)
    first, best, worst, now = values[0], min(losses), max(losses), losses[-1]
    norms, limit = [value for _, value in history.curve(f"{networks[0]}/norm")], history.facts["clip"]
    clipped = sum(norm > limit for norm in norms) / max(1, len(norms))
    noise = statistics.median(abs(b - a) for a, b in itertools.pairwise(values))  # from step to step
    seen = f"gradients were clipped in {clipped:.0%} of the logged steps"
    if best < first and now > best + max(_LOST * (first - best), 3 * noise):
        yield name, f"the loss fell from {first:.3g} to {best:.3g} and is at {now:.3g} again; {seen}", advice
        return
    stuck = not ramp and now > first - 0.01 * abs(first) and clipped > _CLIPPED  # else the first is of a trained model
    if worst > first + max(2 * (first - best), 3 * noise) or stuck:
        yield name, f"the loss began at {first:.3g}, went up to {worst:.3g} and is at {now:.3g}; {seen}", advice


def _smooth(values: list[float]) -> list[float]:
    """Medians over windows of a twentieth of the values, of five at least; there are more values than that."""
    width = max(5, len(values) // 20)
    return [
        statistics.median(values[max(0, end - width) : end]) for end in range(min(width, len(values)), len(values) + 1)
    ]


def _is_best_now(history: History) -> bool:
    """Whether the headline metric was never better, where it was measured three times or more."""
    values = [value for _, value in history.curve(history.headline or "", _begin(history))]
    better = max if history.facts.get("higher_is_better") else min
    return len(values) >= 3 and values[-1] == better(values)


def waiting(history: History) -> Found:
    wait, seconds = _recent(history, "wait"), history.curve("seconds")
    if wait is None or wait <= _WAIT:
        return
    lines = seconds[-min(100, max(_LINES, len(seconds) // 4)) :]
    if wait * (lines[-1][1] - lines[0][1]) > 0.5:  # of a run of milliseconds nobody waits for anything
        seen = f"{wait:.0%} of the time since the last lines went by waiting for samples"
        advice = (
            "read with processes (training.data.workers=2), put the shards on a local disk, or pack smaller pictures"
        )
        yield "waiting for data", seen, advice


RULES: tuple[Callable[[History], Found], ...] = (
    codebook_collapse,
    posterior_collapse,
    discriminator_wins,
    mode_collapse,
    discriminator_silent,
    latent_scale,
    at_chance,
    caption_ignored,
    ema_young,
    learning_rate,
    waiting,
)
