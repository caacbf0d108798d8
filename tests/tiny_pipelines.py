"""Pipelines of diffusers, tiny and with random weights."""

import torch


def _vocabulary():
    """A BPE of bytes alone, with a few merges, and CLIP's two last tokens."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "t</w>"), ("r", "e"), ("re", "d</w>"), ("c", "at</w>")]
    words = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    return {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges


def stable_diffusion(kind):
    """Of the sizes that CompVis' files imply: 32 groups, 8 heads or heads 64 wide."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    vocab, merges = _vocabulary()
    first = kind == "sd1"
    tokenizer = transformers.CLIPTokenizer(
        vocab=vocab, merges=merges, pad_token="<|endoftext|>" if first else "!", model_max_length=77
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64, attention_head_dim=8 if first else (1, 2), use_linear_projection=not first,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64, 64), layers_per_block=1, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(vocab), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1,
            hidden_act="quick_gelu" if first else "gelu", bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1,
        )
    )  # fmt: skip
    for network in (unet, vae, text):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1 if network is not vae else 0.05)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
        prediction_type="epsilon" if first else "v_prediction",
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
