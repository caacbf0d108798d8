"""What the stages of tokenizers with codes hand to their objectives: terms, schedules, and codes that begin anew."""

import pytest
import torch
from test_tokenizer_stages import knob, stage_of

from kartina.layers import random
from kartina.training.objectives import dvae as dvae_objective
from kartina.training.objectives.dvae import uniform_kl

COMMITMENT, CODEBOOK = knob("commitment_weight", 0.5), knob("codebook_weight", 2)


def outputs(stage, batch, step=0):
    """What the network gives in the first update of a step, and that update."""
    kept = []
    handle = stage.network.register_forward_hook(lambda module, given, out: kept.append(out))
    update = next(stage.updates(batch, step))
    handle.remove()
    return kept[0], update


@pytest.mark.parametrize("kind", ["vqvae", "vqgan"])
def test_the_commitment_weight_is_of_the_encoder_and_the_codebook_weight_of_the_codes(kind, tiny):
    """|sg[z] - e|^2 moves the codes alone, |z - sg[e]|^2 the encoder; as released, VQ-GAN had them the other way."""
    found = {}
    for words in ([COMMITMENT, CODEBOOK], [knob("commitment_weight", 0), CODEBOOK]):
        stage, batch = stage_of(tiny, kind, *words)
        out, (_, (loss, _), _) = outputs(stage, batch)
        z, e = out["latents"], out["codewords"]
        found[words[0]] = torch.autograd.grad(loss, [z, e])
        apart = 2 * (z - e).detach() / z[0].numel()
    (own, codes), (without, _) = found[COMMITMENT], found[knob("commitment_weight", 0)]
    assert apart.abs().max() > 1e-4
    torch.testing.assert_close(codes, -2 * apart)
    torch.testing.assert_close(own - without, 0.5 * apart, rtol=1e-4, atol=1e-7)


def test_the_relaxation_of_gumbel_codes_falls_and_its_kl_is_to_the_uniform(tiny):
    words = [knob("kl_weight", 0.5), knob("temperature", 2.0), knob("temperature_end", 0.5)]
    stage, batch = stage_of(tiny, "vqgan, gumbel", *words, knob("temperature_share", 0.5))
    noise, first = stage._relaxation(batch, 0)
    assert noise.shape == (8, 32, 8, 8) and first == 2.0
    assert [stage._relaxation(batch, step)[1] for step in (5, 10, 19)] == [1.25, 0.5, 0.5]
    assert not torch.equal(noise, stage._relaxation(batch, 1)[0])
    out, (_, _, scalars) = outputs(stage, batch)
    kl = uniform_kl(out["logits"]).mean()
    assert kl > 0
    torch.testing.assert_close(scalars["regular"], 0.5 * kl.detach())


def test_a_dvae_is_first_an_autoencoder_then_its_schedules_begin(tiny, monkeypatch):
    words = [knob("autoencoder", 0.25), knob("kl_weight", 6.6), knob("kl_share", 0.2), knob("temperature", 2.0)]
    stage, batch = stage_of(tiny, "dvae", *words, knob("temperature_end", 0.5), knob("temperature_share", 0.8))
    seen, network, loss = {}, stage.forward["tokenizer"], dvae_objective.dvae
    for step in (0, 4, 5, 7, 9, 11, 17, 19):

        def forward(image, noise, temperature, step=step):
            seen[step] = [noise, temperature]
            return network(image, noise, temperature)

        def objective(*given, step=step):
            seen[step].append(given[3])
            return loss(*given)

        stage.forward = {"tokenizer": forward}
        monkeypatch.setattr(dvae_objective, "dvae", objective)
        next(stage.updates(batch, step))
    assert all(seen[step][0] is None and seen[step][2] == 0 for step in (0, 4))
    spec, samples = stage.network.spec, batch.samples
    drawn = random.gumbel(0, 5, samples, (*spec.shape, spec.vocabulary), "dvae gumbel").permute(0, 3, 1, 2)
    assert torch.equal(seen[5][0], drawn)
    # 15 steps are left: the temperature falls over 12 of them, by the cosine, and the weight rises over 4 steps
    assert [seen[step][1] for step in (5, 11, 17, 19)] == pytest.approx([2.0, 1.25, 0.5, 0.5])
    assert [seen[step][2] for step in (5, 7, 9, 19)] == pytest.approx([0.0, 3.3, 6.6, 6.6])


def test_the_kl_of_a_dvae_weighs_as_it_says(tiny):
    shown, words = {}, [knob("autoencoder", 0), knob("kl_share", 0), knob("squared", 0)]
    for weight in (0, 8):
        stage, batch = stage_of(tiny, "dvae", *words, knob("kl_weight", weight))
        out, (_, (loss, count), _) = outputs(stage, batch, 3)
        shown[weight] = loss.detach() / count
    kl = uniform_kl(out["logits"]).sum(dim=(1, 2)).mean().detach()
    assert kl > 0
    values = batch.image[0].numel()
    torch.testing.assert_close((shown[8] - shown[0]) * values, 8 * kl, rtol=1e-3, atol=1e-3)


def test_codes_begin_anew_at_latents_far_from_theirs_and_no_two_at_one(tiny):
    """As k-means++ draws: in proportion to the squared distance, without repetition."""
    stage, batch = stage_of(tiny, "vqvae", knob("restart_every", 2))
    quantizer = stage.network.quantize
    for step in range(2):
        kept = outputs(stage, batch, step)[0]
        list(stage.updates(batch, step))
    unmet = torch.bincount(kept["codes"].flatten(), minlength=32) == 0
    assert unmet.sum() > 1
    assert len(quantizer.embedding.weight[unmet].unique(dim=0)) == unmet.sum()

    codewords, first = torch.zeros(8, 4, 8, 8), 0
    latents = codewords.clone()  # half of them lie on their codes
    latents[:, 0, :, 4:] = 1.0
    latents[:, 0, 0, 7] = 10.0  # a hundred times as far, in square: 8 of 256 places
    out = {"latents": latents, "codewords": codewords, "codes": torch.zeros(8, 8, 8, dtype=torch.int64)}
    for step in range(400):
        found = stage.codebook._candidates(out, batch, step, 300)
        assert len(found) == 256 and (found[:, 0] > 0).all()
        first += int(found[0, 0] == 10)
    share = 8 * 100 / (8 * 100 + 248)
    assert abs(first / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5


def test_what_was_met_of_old_codes_counts_for_no_new_ones(tiny):
    stage, batch = stage_of(tiny, "vqvae", knob("restart_every", 8), knob("kmeans", 0.25))
    list(stage.updates(batch, 0))
    assert stage.network.quantize.met.any()
    stage.restart()
    assert not stage.network.quantize.met.any()
