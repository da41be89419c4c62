"""longalign_ray: construct, pack, train, serve and evaluate long-context aligned language models on Ray."""

__version__ = "0.1.0"
