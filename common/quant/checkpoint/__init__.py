"""Checkpoints on disk: reading any, writing NVFP4 in both vocabularies."""
