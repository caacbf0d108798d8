"""The seam: eps, x_0 and v invert each other, learned shares, guidance, clipping, and what is refused."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from kartina.priors.condition import Condition
from kartina.priors.denoiser import Clipped, Denoiser, Guided, convert
from kartina.priors.schedules import new_schedule

T = torch.tensor([0, 10, 500, 998])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_eps_x_0_and_v_invert_each_other(zero_terminal):
    schedule = new_schedule(zero_terminal=zero_terminal)
    x_0, eps = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)
    x_t, (alpha, sigma) = schedule.diffuse(x_0, T, eps), schedule.at(T, x_0)
    for prediction, right in (("eps", eps), ("x_0", x_0), ("v", alpha * eps - sigma * x_0)):
        found = convert(right, x_t, alpha, sigma, prediction)
        torch.testing.assert_close(found, (x_0, eps), atol=1e-9, rtol=0)
        again = alpha * found[1] - sigma * found[0]
        torch.testing.assert_close(again, alpha * eps - sigma * x_0, atol=1e-9, rtol=0)


@pytest.mark.parametrize("prediction", ["x_0", "v"])
def test_pure_noise_has_a_prediction(prediction):
    schedule, last = new_schedule(zero_terminal=True), torch.tensor([999])
    x_t, out = normal(1, 2, 3, 3), normal(1, 2, 3, 3, seed=1)
    found = Denoiser(lambda x, t, c: out, schedule, prediction)(x_t, last, None)
    torch.testing.assert_close(found.x_0, out if prediction == "x_0" else -out)
    torch.testing.assert_close(found.eps, x_t)
    with pytest.raises(ValueError, match="zero terminal SNR; let the network predict v or x_0"):
        Denoiser(lambda x, t, c: out, schedule, "eps")


def test_conversion_is_in_full_precision():
    schedule, x_t = new_schedule(), normal(4, 3, 2, 2, dtype=torch.float32)
    network = torch.nn.Conv2d(3, 6, 1).bfloat16()
    denoise = Denoiser(lambda x, t, c: network(x.bfloat16()), schedule, "v")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = denoise(x_t, T, None)
    assert {found.x_0.dtype, found.eps.dtype, found.variance_share.dtype} == {torch.float32}
    alpha, sigma = schedule.at(T, x_t)
    torch.testing.assert_close(alpha * found.x_0 + sigma * found.eps, x_t)
    torch.testing.assert_close(found.variance_share, (network(x_t.bfloat16())[:, 3:].float() + 1) / 2)


def test_the_condition_and_t_pass_through_untouched():
    asked, t = object(), torch.tensor([3.5, 0.25])

    def network(x, time, condition):
        assert condition is asked and time is t
        return x

    assert Denoiser(network, new_schedule())(torch.zeros(2, 1, 2, 2), t, asked).variance_share is None


class Two:
    """A network of two conditions that counts its passes."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, x, t, condition):
        self.passes += 1
        return torch.tanh(x * condition) + 0.1 * condition


def test_guidance_by_hand():
    network, x_t = Two(), normal(4, 3, 4, 4)
    plain = Denoiser(network, new_schedule(), "v")
    own, null = plain(x_t, T, 2.0), plain(x_t, T, -1.0)
    network.passes = 0
    one = Guided(plain, -1.0, 1.0)(x_t, T, 2.0)
    assert torch.equal(one.x_0, own.x_0) and torch.equal(one.eps, own.eps) and network.passes == 1
    found = Guided(plain, -1.0, 3.0)(x_t, T, 2.0)
    assert network.passes == 3
    torch.testing.assert_close(found.eps, null.eps + 3 * (own.eps - null.eps))
    alpha, sigma = plain.schedule.at(T, x_t)
    torch.testing.assert_close(alpha * found.x_0 + sigma * found.eps, x_t)  # the same in x_0
    torch.testing.assert_close(Guided(plain, -1.0, 0.0)(x_t, T, 2.0).x_0, null.x_0)


def test_one_pass_over_both_conditions_is_two_passes():
    weight = normal(6, 3, seed=2)
    passes = []

    def network(x, t, condition):  # learns variances
        passes.append(len(x))
        return torch.einsum("oc,bchw->bohw", weight, torch.tanh(x * condition.embedding[:, :, None, None]))

    x_t, condition, null = normal(4, 3, 2, 2), *(Condition(embedding=normal(4, 3, seed=n)) for n in (3, 4))
    plain = Denoiser(network, new_schedule(), "v")
    expected = Guided(plain, null, 3.0)(x_t, T, condition)
    found = Guided(plain, null, 3.0, join=Condition.beside)(x_t, T, condition)
    assert passes == [4, 4, 8]
    torch.testing.assert_close(found.x_0, expected.x_0)
    torch.testing.assert_close(found.eps, expected.eps)
    torch.testing.assert_close(found.variance_share, expected.variance_share)


def test_rescaled_guidance_is_that_of_diffusers():
    network, x_t = Two(), normal(4, 3, 4, 4)
    plain = Denoiser(network, new_schedule(zero_terminal=True), "v")
    v = {condition: network(x_t, T, condition) for condition in (2.0, -1.0)}
    guided = v[-1.0] + 7.5 * (v[2.0] - v[-1.0])
    expected = rescale_noise_cfg(guided, v[2.0], guidance_rescale=0.7)
    found = Guided(plain, -1.0, 7.5, rescale=0.7)(x_t, T, 2.0)
    alpha, sigma = plain.schedule.at(T, x_t)
    torch.testing.assert_close(alpha * found.eps - sigma * found.x_0, expected)
    torch.testing.assert_close(alpha * found.x_0 + sigma * found.eps, x_t)


def test_guidance_in_an_interval():
    network, x_t = Two(), normal(4, 3, 4, 4)
    plain = Denoiser(network, new_schedule(zero_terminal=True), "v")
    own, everywhere = plain(x_t, T, 2.0), Guided(plain, -1.0, 3.0)(x_t, T, 2.0)
    found = Guided(plain, -1.0, 3.0, interval=(0.1, 5.0))(x_t, T, 2.0)  # sigma / alpha: 0.01, 0.05, 3.4, 300
    assert torch.equal(found.x_0[[0, 1, 3]], own.x_0[[0, 1, 3]]) and torch.equal(found.eps[2], everywhere.eps[2])
    last = torch.full((4,), 999)
    open_ended = Guided(plain, -1.0, 3.0, interval=(0.1, float("inf")))(x_t, last, 2.0)
    assert torch.equal(open_ended.x_0, Guided(plain, -1.0, 3.0)(x_t, last, 2.0).x_0)
    network.passes = 0
    Guided(plain, -1.0, 3.0, interval=(0.1, 5.0))(x_t, torch.zeros(4, dtype=torch.int64), 2.0)
    assert network.passes == 1


def test_clipping_keeps_x_t():
    schedule, x_t = new_schedule(), 3 * normal(4, 3, 2, 2)
    found = Clipped(Denoiser(lambda x, t, c: 0.1 * x, schedule))(x_t, T, None)
    alpha, sigma = schedule.at(T, x_t)
    assert found.x_0.abs().max() == 1
    torch.testing.assert_close(alpha * found.x_0 + sigma * found.eps, x_t)


def test_bad_networks_and_knobs_are_refused():
    schedule, x_t = new_schedule(), torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match="one of eps, x_0, v"):
        Denoiser(lambda x, t, c: x, schedule, "noise")
    with pytest.raises(ValueError, match="twice the channels"):
        Denoiser(lambda x, t, c: x[:, :2], schedule)(x_t, torch.tensor([0]), None)
    plain = Denoiser(lambda x, t, c: x, schedule)
    for knobs in ({"scale": -1.0}, {"scale": 2.0, "rescale": 1.5}, {"scale": 2.0, "interval": (3.0, 1.0)}):
        with pytest.raises(ValueError, match="guidance needs"):
            Guided(plain, None, **knobs)


def test_what_was_found_outlives_the_next_call():
    """Of a network that writes all its outputs to the same memory, as a recorded graph does."""
    schedule, memory = new_schedule("linear", 10), torch.zeros(2, 1, 2, 2)

    def network(x_t, t, condition):
        return memory.copy_(x_t)

    for prediction in ("eps", "x_0"):
        denoise, t = Denoiser(network, schedule, prediction), torch.tensor([3, 4])
        found = denoise(torch.ones(2, 1, 2, 2), t, Condition())
        denoise(torch.zeros(2, 1, 2, 2), t, Condition())
        assert (getattr(found, prediction) == 1).all()
