"""Data: what a set holds (`manifest`), where its rows come from (`store`, `digits`), their order and the loader."""
