"""Measurements: what they find is written to docs/ as JSON, and tables are generated from that."""
