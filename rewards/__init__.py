"""The rewards that ship with marval_rl, as marval_rl.rewards; their entry points are like anyone else's."""
