"""The rewards that ship with marval_rl, registered through the same entry points as anyone else's."""
