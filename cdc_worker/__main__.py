"""`python -m cdc_worker` is the command line."""

from cdc_worker.cli import main

main(prog_name="cdc-worker")
