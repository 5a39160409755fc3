"""Public data sets in the layouts they are published in, brought into one manifest (docs/data.md)."""
