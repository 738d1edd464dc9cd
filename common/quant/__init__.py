"""Block-scaled 4-bit formats, scale search, checkpoint vocabularies and backends."""
