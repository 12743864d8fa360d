"""The report of a sweep, as pages, tables and data: `python -m icetransfer.report`."""

PLAN = "plan.json"  # in the results folder: a sweep writes it, the report reads it
