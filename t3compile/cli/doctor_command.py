"""doctor: what this machine can do."""

from __future__ import annotations

import click

from t3compile.cli.options import json_option, shielded


@click.command()
@json_option
@shielded
def doctor(as_json: bool) -> None:
    """List what this machine can do, and what is missing for which command; missing things are no error."""
    from t3compile.doctor import examine
    from t3compile.report import say, show_json, show_table

    findings = examine()
    if as_json:
        show_json([finding.to_json() for finding in findings])
        return
    rows = [(one.what, one.status, one.version or "-", one.detail or "-", one.needed_for or "-") for one in findings]
    show_table("This machine", ("what", "here", "version", "detail", "without it"), rows)
    for one in findings:
        if one.remedy:
            say(f"{one.what}: {one.remedy}")
