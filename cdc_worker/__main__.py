"""`cdc-worker`, which is `python -m cdc_worker` as well."""

import sys


def main() -> None:
    """The command line. Of Ctrl-C there is no traceback, however soon it comes."""
    try:
        from cdc_worker import cli  # noqa: PLC0415  # what it imports takes a while
    except KeyboardInterrupt:
        sys.exit("Aborted!")  # as click says it afterwards
    cli.main(prog_name="cdc-worker")


if __name__ == "__main__":
    main()
