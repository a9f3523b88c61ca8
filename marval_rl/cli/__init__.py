"""The subcommands of ``marval-rl``: one module each, imported only when it is run."""
