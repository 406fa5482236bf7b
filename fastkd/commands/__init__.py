"""The subcommands of `fastkd`, one module each. Importing them is cheap: torch is loaded when a command runs."""
