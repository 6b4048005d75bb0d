"""The console script. Commands say that they were stopped; before one runs, Ctrl-C just ends the process."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own would show where the imports stood
    from t3compile.cli import main as run

    run()


if __name__ == "__main__":
    main()
