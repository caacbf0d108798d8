"""k-means, and the codebook that a dVAE starts from."""

import pytest
import torch

from kartina.tokenizers import kmeans as module
from kartina.tokenizers.dvae import DiscreteVAE
from kartina.tokenizers.kmeans import kmeans


def test_clusters_far_apart_are_found():
    true = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = (true[:, None] + 0.1 * torch.randn(4, 50, 2)).flatten(0, 1)
    centres, counts = kmeans(points, 4, seed=1)
    assert torch.cdist(true, centres).amin(1).max() < 0.1
    assert counts.tolist() == [50] * 4
    assert torch.equal(kmeans(points, 4, seed=1)[0], centres)


def test_a_round_moves_each_centre_to_the_mean_of_its_points_whatever_is_held_at_once(monkeypatch):
    points = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    start, own = kmeans(points, 40, seed=1, rounds=0)[0], []
    for point in points:
        own.append(min(range(40), key=lambda k: float((point - start[k]).square().sum())))
    groups = [points[torch.tensor(own) == k] for k in range(40)]
    centres, counts = kmeans(points, 40, seed=1, rounds=1)
    assert counts.tolist() == [len(group) for group in groups] and min(counts) > 0
    torch.testing.assert_close(centres, torch.stack([group.mean(0) for group in groups]))
    whole = kmeans(points, 40, seed=1)
    sizes, addmm = [], torch.addmm
    monkeypatch.setattr(module, "_DISTANCES", 40 * 7)  # uneven parts
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: sizes.append(addmm(*a, **k)) or sizes[-1])
    parts = kmeans(points, 40, seed=1)
    assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])
    assert max(part.numel() for part in sizes) == 40 * 7


def test_weighted_points_pull_in_proportion_and_are_drawn_so():
    points = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.rand(500, generator=torch.Generator().manual_seed(1)) + 0.1
    start = kmeans(points, 40, seed=1, rounds=0, weight=weight)[0]
    own = torch.cdist(points, start).argmin(1)
    centres, counts = kmeans(points, 40, seed=1, rounds=1, weight=weight)
    assert torch.equal(counts, torch.bincount(own, minlength=40)) and counts.min() > 0
    means = [(weight[own == k, None] * points[own == k]).sum(0) / weight[own == k].sum() for k in range(40)]
    torch.testing.assert_close(centres, torch.stack(means))
    assert torch.equal(kmeans(points, 40, seed=1, weight=torch.full((500,), 2.0))[0], kmeans(points, 40, seed=1)[0])
    light = torch.where(torch.arange(500) < 250, 1.0, 1e-9)  # the latter half is never drawn
    drawn = kmeans(points, 40, seed=1, rounds=0, weight=light)[0]
    assert all((points[:250] == centre).all(1).any() for centre in drawn[1:])


def test_more_centres_than_points_are_refused():
    with pytest.raises(ValueError, match="at least as many points as centres, got 3 for 4"):
        kmeans(torch.randn(3, 2), 4, seed=0)


def test_started_codes_are_the_nearest_centres():
    torch.manual_seed(0)
    model = DiscreteVAE(image_size=16, num_codes=24, width=8, init_width=8, num_groups=3, blocks_per_group=1)
    images = torch.rand(32, 3, 16, 16) * 2 - 1
    before = model(images, None, 1.0)
    stem = model.decoder.stem
    z = torch.einsum("ck,bkhw->bhwc", stem.weight[:, :, 0, 0], before["logits"]) + stem.bias
    model.start_codes([images[:16], images[16:]], seed=3)
    centres = stem.weight[:, :, 0, 0].T  # (K, C)
    nearest = torch.cdist(z.flatten(0, 2), centres).argmin(1).view(32, 4, 4)
    codes = model.encode(images)
    assert (codes == nearest).float().mean() > 0.99  # but for ties that round differently
    assert len(codes.unique()) == 24
    # The decoder's stem now looks the centre up: what it hands on is z, quantised.
    quantised = model.decoder.stem(torch.nn.functional.one_hot(codes, 24).permute(0, 3, 1, 2).float())
    assert (quantised.permute(0, 2, 3, 1) - z).square().sum() < 0.5 * (z - z.mean((0, 1, 2))).square().sum()
