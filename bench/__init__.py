"""Measurements, side by side on the machine they run on.

What is measured: `drain`, `latency`, `application`, `catchup`, `growth`, `idle`, `decode`, `replay`, `backfill` and
`shutdown`, each on servers of its own (`server`) and in `sizes` that the command line (`__main__`) gives. Who drains a
backlog stands in `clients`, of which `psycopg2_client` and `debezium_client` are processes of their own, and what they
cost in `usage`. Of all this `figures` makes medians and ratios, `aims` judges them, and `report` and `plots` tell them,
with the `machine` they are of.
"""
