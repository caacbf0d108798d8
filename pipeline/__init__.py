"""The pipeline: samples, decodes, ranks and writes; loads and saves model folders. It never imports training."""
