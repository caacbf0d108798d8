"""Decoding in tiles: where they lie, that neighbours fade into each other, and that seams are gone."""

import torch

from kartina.tokenizers.autoencoder_kl import AutoencoderKL
from kartina.tokenizers.tiles import decode_tiles


def test_a_tile_fades_into_the_next_over_the_overlap():
    """Tiles of one number each: what is seen of it along a row is its weight."""
    seen = []

    def decode(latents):
        seen.append(tuple(latents[0, :2, 0, 0].int().tolist()))
        assert latents.shape[2:] == (4, 4)
        return torch.full((1, 3, 16, 16), float(latents[0, 1, 0, 0]))  # its left edge: 0, 2 or 4

    places = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"))
    whole = decode_tiles(decode, places[None], side=4, overlap=2)
    assert seen == [(top, left) for top in (0, 2, 4) for left in (0, 2, 4)]
    assert whole.shape == (1, 3, 32, 32) and torch.equal(whole, whole[:, :, :1].expand_as(whole))
    row = whole[0, 0, 0]
    assert torch.equal(row[:8], torch.zeros(8)) and torch.equal(row[24:], torch.full((8,), 4.0))
    rises = torch.arange(1, 9) / 8  # over the 8 pixels of an overlap, while the other falls
    torch.testing.assert_close(row[8:16], 2 * rises / (rises + rises.flip(0)))
    assert (row.diff() >= 0).all() and row.diff().max() <= 0.5


def test_the_last_tile_ends_where_the_grid_does():
    starts = []

    def decode(latents):
        starts.append(int(latents[0, 0, 0, 0]))
        return latents[:, :3]

    line = torch.arange(7.0).expand(1, 3, 4, 7)
    torch.testing.assert_close(decode_tiles(decode, line, side=4, overlap=1), line)
    assert starts == [0, 3]


def test_tiles_of_an_autoencoder_overlap_by_a_quarter():
    """Its convolutions see beyond a tile, and its normalisation the whole: seams of tiles side by side are worse."""
    network = AutoencoderKL(
        image_size=64, width=8, channel_mult=(1, 1), blocks_per_level=1, norm_groups=4, attn_resolutions=()
    ).eval()
    z = torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        whole = network.decode(z)
        network.tile = 16
        tiled = network.decode(z)
        torch.testing.assert_close(tiled, decode_tiles(network._image, z, side=16, overlap=4), rtol=0, atol=0)
        apart = decode_tiles(network._image, z, side=16, overlap=0)
    assert 0 < (tiled - whole).square().mean() < 0.9 * (apart - whole).square().mean()
