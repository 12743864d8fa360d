"""Pages, tables and figures: of a sweep, `python -m icetransfer.report`, and of a recipe's data."""

PLAN = "plan.json"  # in the results folder: a sweep writes it, the report reads it
