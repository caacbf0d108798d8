"""Overrides that give shapes/dalle other tokenizers, small ones, for tests of plans."""

BATCH = 4
PLAIN = "stages.tokenizer.objective={}"
LAYOUT = "image_size: 32, width: 16, channel_mult: [1, 2], norm_groups: 4"
RECONSTRUCTING = {
    "autoencoder": LAYOUT,
    "vae": LAYOUT,
    "autoencoder_kl": LAYOUT,
    "vqgan": f"{LAYOUT}, num_codes: 64, code_dim: 8, latent_channels: 8",
    "vqvae": "image_size: 32, width: 16, residual_width: 16, num_codes: 64, code_dim: 8",
}
_PATCHES = "parts.discriminator={kind: patch, width: 16, depth: 2, norm: group, norm_groups: 4}"
JUDGED = {  # by a discriminator
    "vqgan": [f"parts.tokenizer={{kind: vqgan, {RECONSTRUCTING['vqgan']}}}", _PATCHES],
    "autoencoder_kl": [f"parts.tokenizer={{kind: autoencoder_kl, {LAYOUT}}}", _PATCHES],
    "aae": [
        f"parts.tokenizer={{kind: autoencoder, latent_dim: 2, {LAYOUT}}}",
        "parts.discriminator={kind: latent, latent_dim: 2, num_classes: 10, width: 64}",
    ],
}
_COMPARING = "stages.tokenizer.objective={perceptual: efficientnet-lite2}"
OBJECTIVES = {"vqgan": _COMPARING, "autoencoder_kl": _COMPARING, "aae": "stages.tokenizer.objective={prior: mixture}"}
