"""The papers' tables and figures, measured here: `gtddp reproduce` (docs/design/0004-experiments.md)."""
