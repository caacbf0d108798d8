"""Pictures that explain: what latent spaces, codebooks and relaxations look like, with the numbers beside them."""
