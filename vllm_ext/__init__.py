"""vLLM binding."""
