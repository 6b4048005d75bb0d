"""The command line: a thin shell over the public functions. Results go to stdout, messages to stderr.

Exit codes: 0 done; 1 a check failed; 2 bad input; 3 done, but attention that might be windowed was left full;
130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import click

from t3compile.cli.bench_command import bench
from t3compile.cli.deploy_commands import deploy
from t3compile.cli.doctor_command import doctor
from t3compile.cli.engine_commands import build_engine
from t3compile.cli.export_commands import export, run
from t3compile.cli.kernel_commands import kernels
from t3compile.cli.model_commands import cost, inspect, plan, rewrite, verify


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="t3compile")
def main() -> None:
    """Rewrite the full attention of a trained video DiT into T3 window attention.

    MODEL is a torch.export .pt2, a diffusers folder, a pickled .pt (with --trust-pickle), or package.module:factory.
    """


for _command in (inspect, plan, cost, rewrite, verify, export, build_engine, run, bench, kernels, deploy, doctor):
    main.add_command(_command)
