"""The command line. It knows people; everything else lives in the library, imported when used."""

from __future__ import annotations

from typing import Any

import click

from blackbox_vlm._version import __version__
from blackbox_vlm.commands_audit import audit
from blackbox_vlm.commands_probe import probe
from blackbox_vlm.commands_serve import serve_blackbox
from blackbox_vlm.commands_tune import demo, resume, tune
from blackbox_vlm.commands_use import evaluate, inspect, predict
from blackbox_vlm.console import say
from blackbox_vlm.errors import BlackboxError, StorageError


class Commands(click.Group):
    """A group that turns our errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BlackboxError as error:
            _tell(f"Error: {error}", error)
            ctx.exit(error.exit_code)
        except BrokenPipeError:  # whoever read our output has enough; click ends quietly
            raise
        except OSError as error:
            say(f"Error: {error.filename}: {error.strerror}; choose another path")
            ctx.exit(StorageError.exit_code)
        except KeyboardInterrupt as error:
            _tell("Stopped at once; what was settled is kept.", error)
            ctx.exit(130)


def _tell(line: str, error: BaseException) -> None:
    """What happened, and then what was noted on the way up: how to go on."""
    for text in (line, *getattr(error, "__notes__", ())):
        say(text)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="blackbox-vlm")
def main() -> None:
    """Tune a vision-language model that you can only query, inside a budget that holds.

    Exit codes: 0 done, 2 wrong input, 3 budget spent, 4 endpoint broken, 5 key refused, 6 disk or
    ledger, 7 no credit left behind the key, 130 interrupted (resumable).
    """


for _command in (tune, resume, audit, evaluate, predict, inspect, probe, serve_blackbox, demo):
    main.add_command(_command)
