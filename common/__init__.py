"""Engine-neutral core: imports torch where needed, never vllm or sglang."""

__version__ = "0.1.0"
