"""`cdc-worker`, which is `python -m cdc_worker` as well."""

import codecs
import io
import json
import sys


def main() -> None:
    """The command line. Of Ctrl-C there is no traceback, however soon it comes."""
    codecs.register_error("cdc_worker.escape", _escaped)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what stderr can't write it escapes by itself
        sys.stdout.reconfigure(errors="cdc_worker.escape")
    try:
        from cdc_worker import cli  # noqa: PLC0415  # what it imports takes a while
    except KeyboardInterrupt:
        sys.exit("Aborted!")  # as click says it afterwards
    cli.main(prog_name="cdc-worker")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """What the terminal's encoding lacks, as backslashreplace has it but for emojis: what is JSON remains JSON."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


if __name__ == "__main__":
    main()
