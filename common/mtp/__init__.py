"""Multi-token prediction (MTP): the heads that checkpoints ship, described, and run on both engines."""
