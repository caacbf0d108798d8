"""Priors: distributions over what a tokenizer makes of an image, given a caption. A prior sees tensors only."""
