"""Floor 5: the `pumice` command."""

from __future__ import annotations

import os
import sys

import click

from pumice.cli.erase import erase
from pumice.cli.evaluate import evaluate
from pumice.cli.memorization import memorization
from pumice.cli.options import printable
from pumice.cli.personalize import personalize
from pumice.cli.protect import protect
from pumice.cli.purify import purify

BAD_INPUT, INTERRUPTED = 2, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pumice")
def commands() -> None:
    """Protect, purify, personalize, erase and audit with text-to-image diffusion models."""


@commands.command()
def env() -> None:
    """Show what was compiled, what loaded and why something did not."""
    import pumice

    click.echo(pumice.env())


for command in (erase, evaluate, memorization, personalize, protect, purify):
    commands.add_command(command)


def main() -> None:
    """Run the command line. Bad input is one line on stderr and exit code 2."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        status = commands.main(prog_name="pumice", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = BAD_INPUT
    except (click.ClickException, ValueError, TypeError, OSError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"pumice: {printable(' '.join(message.split()))}", err=True)
        status = BAD_INPUT
    except (click.Abort, KeyboardInterrupt):
        click.echo(
            "pumice: interrupted; nothing is half-written, "
            "and a folder, a training of personalize, a scan or bench goes on where it stopped",
            err=True,
        )
        status = INTERRUPTED
    sys.exit(status if isinstance(status, int) else 0)
