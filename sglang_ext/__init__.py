"""SGLang binding."""
