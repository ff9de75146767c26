"""One target under atheris, as a process: `python -m fuzz.harness TARGET`, and libFuzzer's arguments."""

import sys
from pathlib import Path

import atheris

sys.path.append(str(Path(__file__).parent.parent / "tests"))

with atheris.instrument_imports(include=["cdc_worker", "fuzzing"]):
    import fuzzing


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    atheris.Setup([sys.argv[0], *sys.argv[2:]], fuzzing.TARGETS[sys.argv[1]])
    atheris.Fuzz()


main()
