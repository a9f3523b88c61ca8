"""The recipes that ship with marval_rl; a wheel has them as marval_rl.shipped_recipes."""
