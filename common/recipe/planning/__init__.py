"""Which layout serves a model best on given hardware, by an analytic model."""
