"""The command line, for tests that call it in their own process."""

from headwater.cli.commands import command_line

commands = command_line()
